"""Photographs, encoders and finished runs that the tests of whole commands share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import (
    ForkServer,
    Place,
    Result,
    make_encoders,
    make_flux,
    make_photographs,
    run_command,
    write_flux_run,
    write_run,
)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for everything that is made once."""
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def home(workshop: Path) -> Path:
    """The user's cache folder, where hashes of encoders are remembered."""
    return workshop / "home"


@pytest.fixture(scope="session")
def photographs(workshop: Path) -> Path:
    """Nine photographs with captions. Read only: a test that changes them copies the folder."""
    return make_photographs(workshop / "photographs")


@pytest.fixture(scope="session")
def encoders(workshop: Path) -> Path:
    """Tiny encoders of the real topologies. Read only."""
    return make_encoders(workshop / "encoders")


@pytest.fixture(scope="session")
def server(workshop: Path, home: Path, photographs: Path, encoders: Path) -> Iterator[ForkServer]:
    """Starts commands without paying for the imports each time."""
    planned = workshop / "planned"
    base = make_flux(planned / "flux.safetensors")
    runs = [
        write_run(planned / "tf", photographs, encoders),
        write_flux_run(planned / "fd", photographs, encoders, base),
    ]
    server = ForkServer(workshop / "server", home, runs)
    yield server
    server.close()


@pytest.fixture(scope="session")
def python(workshop: Path, home: Path) -> Callable[..., Result]:
    """Run ``python arguments...`` in a folder, as a user would."""

    def run(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> Result:
        return run_command(arguments, cwd or workshop, home, **environment)

    return run


@pytest.fixture(scope="session")
def caches(workshop: Path, photographs: Path, encoders: Path, server: ForkServer) -> Path:
    """Complete caches of the photographs, made by the three jobs. Read only: copy them with `copy_tree`."""
    config = write_run(workshop / "cached", photographs, encoders)
    for job in ("latents", "text", "experts"):
        result = server.run(job, [config], workshop)
        result.expect(0)
    return workshop / "cached" / "cache"


@pytest.fixture(scope="session")
def flux_caches(workshop: Path, photographs: Path, encoders: Path, server: ForkServer) -> Path:
    """Like `caches`, for a LoRA on a small FLUX.1."""
    folder = workshop / "flux_cached"
    config = write_flux_run(folder, photographs, encoders, make_flux(folder / "flux.safetensors"))
    for job in ("latents", "text"):
        server.run(job, [config], workshop).expect(0)
    return folder / "cache"


@pytest.fixture
def new_run(tmp_path: Path, photographs: Path, encoders: Path) -> Callable[..., Path]:
    """Write a run file into a new folder; see `project.write_run`."""

    def write(
        root: Path | None = None, images: Path | None = None, file_name: str = "run.toml", **changes: object
    ) -> Path:
        return write_run(root or tmp_path, images or photographs, encoders, file_name, **changes)

    return write


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, photographs: Path, encoders: Path, caches: Path, server: ForkServer
) -> Place:
    """Where the runs of the file are made."""
    return Place(tmp_path_factory.mktemp("runs"), photographs, encoders, caches, server)
