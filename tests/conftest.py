"""Settings for all tests."""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before any import of Triton, so that the CPU interprets its kernels
    from benchmarks.on_gpu.interpreter import quicken

    quicken()

# modules that the fork server imports once for all processes, because importing torch takes seconds
PRELOADED = ["tests.test_crash", "tests.test_ranks", "tests.test_sharded_formats", "torch._dynamo"]
multiprocessing.set_forkserver_preload(PRELOADED)

# no deadline, because times vary on shared machines; the same examples each time, so that only a change fails a test
settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
# `pytest --hypothesis-profile random` searches new examples each time, for longer, and prints how to repeat a failure
settings.register_profile("random", deadline=None, print_blob=True, max_examples=100)
settings.load_profile("default")


@pytest.fixture
def nothing_is_free_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device whose numbers the host would have to wait for."""
    import grokadamw  # noqa: F401
    from benchmarks.on_gpu.rehearsal import that_read

    for module in that_read():
        monkeypatch.setattr(module, "reads_are_free", lambda device: False)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """Make this process the only rank of torch.distributed."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection, which would search it for a tenth of a second each time."""
    gc.freeze()
