"""Repositories of models on the hub: which files they hold, and downloading one of them.

What was downloaded once is found again without a connection: the list of files is then that of the local cache.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from musubi_tuner.errors import CheckpointError

LOCAL_ONLY = ContextVar("LOCAL_ONLY", default=False)


@contextmanager
def local_only() -> Iterator[None]:
    """Inside, repositories are what the local cache holds of them: nothing is asked for and nothing downloaded."""
    token = LOCAL_ONLY.set(True)
    try:
        yield
    finally:
        LOCAL_ONLY.reset(token)


def _transport_error() -> type[Exception]:
    """What the HTTP library of huggingface_hub raises without a connection; the library differs between releases."""
    try:
        module = importlib.import_module("httpx2")
    except ImportError:
        module = importlib.import_module("httpx")
    error: type[Exception] = module.TransportError
    return error


class Repository:
    """One revision of a repository.

    Args:
        repo: ``owner/name``. revision: branch, tag or commit; absent = main.
        published: spellings in use of one repository; another of them is suggested when this one is not found.
    """

    def __init__(self, repo: str, revision: str | None = None, published: Sequence[str] = ()) -> None:
        self.repo, self.revision = repo, revision
        others = [name for name in published if name != repo] if repo in published else []
        self.hint = f" Did you mean {others[0]}?" if others else ""
        self.offline = LOCAL_ONLY.get()

    def __str__(self) -> str:
        return f"{self.repo} (revision {self.revision or 'main'})"

    def names(self) -> list[str]:
        """Paths of all files, sorted.

        Raises:
            CheckpointError: if the repository cannot be read; says how to get access.
        """
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled

        with self._explained():
            if not self.offline:
                try:
                    info = HfApi().model_info(self.repo, revision=self.revision)
                    return sorted(file.rfilename for file in info.siblings or [])
                except (OfflineModeIsEnabled, _transport_error()):
                    self.offline = True
            snapshot = Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
            return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())

    def fetch(self, name: str) -> Path:
        """Download a file.

        Raises:
            CheckpointError: as `names`.
        """
        from huggingface_hub import hf_hub_download

        with self._explained():
            return Path(hf_hub_download(self.repo, name, revision=self.revision, local_files_only=self.offline))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except GatedRepoError:
            raise CheckpointError(
                f"{self}: access is gated. Accept the licence at https://huggingface.co/{self.repo} and put your token into "
                "HF_TOKEN"
            ) from None
        except RevisionNotFoundError:
            raise CheckpointError(f"{self}: no such revision on the hub") from None
        except RepositoryNotFoundError:
            raise CheckpointError(
                f"{self}: no such repository on the hub, or it is private (put your token into HF_TOKEN).{self.hint}"
            ) from None
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"{self}: is not in the local cache and the hub cannot be reached. Connect once, or download the files and "
                "give their folder"
            ) from None
        except (EntryNotFoundError, HfHubHTTPError) as error:
            raise CheckpointError(f"{self}: the hub answered: {error}") from error
