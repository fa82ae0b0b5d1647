"""Shared set-up: no network, one thread for each worker, what is long, and no chapter 05 where its model is nowhere."""

import functools
import gc
import os
import platform
import signal
from importlib.metadata import distributions, version
from importlib.util import find_spec
from typing import Any

# two workers, with as many threads as there are cores each, wait for one another: most tests took five times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")
# inductor's pool of compilers is one more process that imports torch, for each process that compiles
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# in an empty cache, inductor builds ten small programs to learn that the compiler knows what the processor can do
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Dynamo formats the stack at each operation; for columns, Python compiles the lines anew: up to a quarter of the time
os.environ.setdefault("PYTHONNODEBUGRANGES", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import inductor_cache
import pytest
import torch
import warm_kernels
from jupyter_client.provisioning import local_provisioner
from lengths import few_of
from models import KINDS, load
from pool_sources import save_sources

from hotswap_lab import AdapterPool
from hotswap_lab.beyond.guards import compilers_kept

inductor_cache.choose()
THREADS = 1
torch.set_num_threads(THREADS)


#: the notebook that needs SmolLM2; its solutions do without it
NEEDS_SMOLLM2 = "notebooks/05_real_llm.ipynb"
#: the notebook that shows what one version of PEFT does
NEEDS_PEFT = "notebooks/beside_peft.ipynb", "0.21."
#: what the notebook on serving needs
NEEDS_RAY = "notebooks/09_beyond_one_machine.ipynb"
#: what cells with a tag need, and how to get it
NEEDS = {
    "needs-ray": (("ray", "openai"), 'needs pip install "ray[serve]" openai'),
    **{
        f"needs-{each}": ((each,), f"needs pip install {each}")
        for each in ("gradio", "torchao", "bitsandbytes", "trl", "sentence_transformers")
    },
}
#: a program that can't even be looked into without it
collect_ignore = [] if find_spec("ray") else ["serving/replica_faults.py"]
#: what the short form leaves out: solutions, which tests/lessons has too; what is about PEFT's own hotswap; recipes
LONG_NOTEBOOKS = "notebooks/solutions/", NEEDS_PEFT[0], "notebooks/recipes"
#: examples that start a process or a compiler, as a chapter does with the same names
LONG_EXAMPLES = (".in_new_process", ".Guards", ".WriteScrubber", "bench.run", ".pick_backend")


#: files whose tests share what takes long to make: a kernel, a browser, processes, a file of compiled code
TOGETHER = (
    ".ipynb",
    "/test_front_ends.py",
    "/test_one_process.py",
    "/test_live.py",
    "/test_distributed.py",
    "/test_bad_files.py",
    "/test_ahead.py",
    "/test_ahead_checks.py",
    "/test_bench.py",
    "/test_crossings.py",
    "/test_parts.py",
    "/test_sockets.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """The cells of a notebook, and all that share a browser, stay in one worker; any other test goes to a free one."""
    from xdist.scheduler import LoadScopeScheduling

    class TogetherOrAlone(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if path.endswith(TOGETHER) else nodeid

    return TogetherOrAlone(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the notebooks that only the long command runs; skips what can't run, instead of failing in every cell."""
    for item in items:
        if any(each in item.path.as_posix() for each in LONG_NOTEBOOKS) or item.name.endswith(LONG_EXAMPLES):
            item.add_marker(pytest.mark.long)
        if item.path.as_posix().endswith(NEEDS_PEFT[0]) and not version("peft").startswith(NEEDS_PEFT[1]):
            item.add_marker(pytest.mark.skip(reason=f"shows what PEFT {NEEDS_PEFT[1]} does; another one is installed"))
        tags = item.cell.metadata.get("tags", []) if hasattr(item, "cell") else []
        if item.path.as_posix().endswith(NEEDS_RAY):
            tags = [*tags, "needs-ray"]
        for modules, reason in [NEEDS[tag] for tag in tags if tag in NEEDS]:
            if not all(map(find_spec, modules)):
                item.add_marker(pytest.mark.skip(reason=reason))
    items = [item for item in items if item.path.as_posix().endswith(NEEDS_SMOLLM2)]
    if not items:
        return
    from hotswap_lab import HotswapError
    from hotswap_lab.demo import smollm2

    try:
        smollm2.find()
    except HotswapError as error:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=str(error).replace("\n", " ")))


def pytest_configure() -> None:
    """Kernels come out of a process that has imported what they need; elsewhere, a fork isn't safe or isn't there.

    Where Ray is, each starts by itself: Ray has not been tried in one that was forked.
    """
    if platform.system() == "Linux" and not find_spec("ray"):
        local_provisioner.launch_kernel = warm_kernels.launch_kernel


def pytest_collection_finish() -> None:
    """Python's collector need not look again and again at what was imported: about 8 % of the time of most tests."""
    gc.collect()
    gc.freeze()


#: the columns of README's table of versions, between Python's own and the numbers of tests
VERSIONS = ("torch", "peft", "transformers", "huggingface_hub", "diffusers", "safetensors", "ipywidgets")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the run's row for README's table, and append it to the file that VERSIONS_FILE names."""
    installed = (next((found.version for found in distributions(name=each)), "none") for each in VERSIONS)
    stats = terminalreporter.stats
    results = (f"{len(stats[each])} {each}" for each in ("passed", "failed", "error", "skipped") if stats.get(each))
    row = f"| {' | '.join([platform.python_version(), *installed, ', '.join(results)])} |"
    terminalreporter.write_line(row)
    if file := os.environ.get("VERSIONS_FILE"):
        with open(file, "a") as rows:
            print(row, file=rows)


@pytest.fixture(params=few_of(KINDS, ("linear", "conv", "embedding")))
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def sources(tmp_path):
    """Adapters for a pool, in folders."""
    return save_sources(tmp_path)


@pytest.fixture
def model(sources):
    return load(KINDS["llama"], sources["a"])


@pytest.fixture
def pool(model, sources):
    return AdapterPool(model, adapters=sources, progress=False)


@pytest.fixture(scope="session")
def method_folders(tmp_path_factory):
    """Adapters of every method and of every kind of LoRA by name, each saved when it is first asked for."""
    from adapters import METHODS, save_random_adapter_of

    @functools.cache
    def folders_of(name: str) -> list[str]:
        root, (kind, configs) = tmp_path_factory.mktemp("adapters"), METHODS[name]
        numbered = enumerate(configs)
        return [save_random_adapter_of(each, root / str(number), number + 1, kind) for number, each in numbered]

    return folders_of


@pytest.fixture
def fresh_compiler():
    """PyTorch counts graphs per piece of code, whatever the model, and gives up after a number of them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _modes_are_given_back():
    """Whatever happens in a call, it must not leave the caller without gradients."""
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    yield
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    torch.set_num_threads(THREADS)  # programs set their own number of them
    assert modes == (True, False)


@pytest.fixture(autouse=True)
def _compilers_are_given_back():
    """PEFT's BOFT names a C compiler in the environment and leaves it there; all that is compiled later is broken."""
    with compilers_kept():
        yield


@pytest.fixture
def without_garbage():
    """A look for garbage takes long, and it isn't in what other tests have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def python_sigint():
    """Ctrl-C raises KeyboardInterrupt, as in a notebook's kernel. A process in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
