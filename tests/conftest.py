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
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: on the CPU its kernels are interpreted
    from benchmarks.on_gpu.interpreter import quicken

    quicken()

# what processes have imported that tests fork from a server, as importing torch takes them seconds
PRELOADED = ["tests.test_crash", "tests.test_ranks", "tests.test_sharded_formats", "torch._dynamo"]
multiprocessing.set_forkserver_preload(PRELOADED)

# times vary on shared machines; and a test that fails should fail for the change that broke it
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
# pytest --hypothesis-profile random: searches anew each time, for longer, and prints what repeats a find
settings.register_profile("random", deadline=None, print_blob=True, max_examples=100)
settings.load_profile("default")


@pytest.fixture
def nothing_is_free_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats the CPU as a device whose numbers the host would have to wait for."""
    import grokadamw  # noqa: F401
    from benchmarks.on_gpu.rehearsal import that_read

    for module in that_read():
        monkeypatch.setattr(module, "reads_are_free", lambda device: False)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """Makes this process the only rank of torch.distributed."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def pytest_collection_finish() -> None:
    """What is imported is no garbage, and looking for some among it takes a tenth of a second each time."""
    gc.freeze()
