"""Cache job: python cache_scripts/cache_latents.py toml/tinyflux.toml [--dry_run] [--shard i/n]"""

import sys

from musubi_tuner.caching.command import main

if __name__ == "__main__":
    sys.exit(main("latents"))
