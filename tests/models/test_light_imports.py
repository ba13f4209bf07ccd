"""A chat imports the part of transformers that it uses, and the rest stays usable."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import paths
from streamchat.models.light import deferred, import_hooks, libraries, structure
from tests.support.models_help import save, tiny_llama, tiny_neox, write_gguf
from tools.random_gguf import Shape
from tools.random_gguf import write as random_gguf

HEAVY = {
    # torch's compiler, what it needs, and tensors over several machines
    *("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("torch.distributed.checkpoint", "torch.onnx"),
    # libraries that transformers imports if they are installed, for losses, images, sound, and other formats
    *("scipy", "sklearn", "pandas", "torchvision", "torchaudio", "librosa", "soundfile", "timm"),
    *("tensorflow", "jax", "datasets", "peft", "torchao", "bitsandbytes", "matplotlib", "gguf"),
    # other front ends
    *("textual", "prompt_toolkit"),
}
"""Modules that no chat in a pipe may import.

What cannot be avoided: transformers.utils imports huggingface_hub with its HTTP client, jinja2, regex, yaml, and PIL if
it is installed; transformers.integrations.accelerate imports accelerate if it is installed (20 to 40 ms);
transformers.modeling_utils imports generation with its continuous batching, because all models inherit from it.
"""

CHAT = """
import json, sys
from streamchat.cli.main import main
code = main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
raise SystemExit(code)
"""


def python(program: str, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def loaded_by_chat(model: Path, dtype: str = "float32") -> set[str]:
    """Return the modules that a chat in a pipe has imported after its first reply."""
    arguments = ["--model", str(model), "--dtype", dtype, "--cache-size", "64", "--max-new-tokens", "2"]
    done = python(CHAT, *arguments, given="hello\n")
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.usefixtures("compiled_kernels")
def test_a_chat_with_a_gguf_file_imports_nothing_heavy(tmp_path: Path) -> None:
    """From the second start on: the first one converts the file."""
    shape = Shape(128, 2, 4, 2, 256)
    random_gguf(tmp_path / "random.gguf", shape, "Q4_1", write_gguf(tmp_path / "tokenizer.gguf"), name="random")
    for _ in range(2):
        modules = loaded_by_chat(tmp_path / "random.gguf", dtype="auto")
    assert modules & HEAVY == set()


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("kind", ["llama", "gpt-neox"])
def test_a_chat_imports_nothing_heavy(tmp_path: Path, kind: str) -> None:
    model = tiny_llama(max_position_embeddings=4096) if kind == "llama" else tiny_neox()
    modules = loaded_by_chat(save(model, tmp_path / "model"))
    assert f"transformers.models.{kind.replace('-', '_')}.modeling_{kind.replace('-', '_')}" in modules
    assert modules & HEAVY == set()
    assert not any(name.startswith("streamchat.commands.") for name in modules)


# --- everything else still works -----------------------------------------------------------------------------------

WHOLE = """
import builtins, json, sys
before = builtins.__import__
import torch
allow = torch.compiler.allow_in_graph
from streamchat.models.light.libraries import import_libraries
import_libraries("llama")
assert builtins.__import__ is before and torch.compiler.allow_in_graph is allow and "_dynamo" not in vars(torch)
assert not any(name in sys.modules for name in ("scipy", "torch._dynamo", "torch.distributed.tensor"))

from streamchat.models.light.deferred import StandIn
import transformers
from transformers import modeling_utils

def stand_ins(*modules):
    return [
        (name, key)
        for name, module in list(sys.modules.items())
        if name.startswith("transformers")
        for key, value in list(vars(module).items())
        if isinstance(value, StandIn) and value.__dict__["_module"] in modules
    ]

# a function of scipy, as transformers calls it
from transformers.loss import loss_for_object_detection as loss
import numpy
if not isinstance(loss.linear_sum_assignment, StandIn):
    raise SystemExit("scipy was not deferred")
rows, columns = loss.linear_sum_assignment(numpy.array([[4, 1, 3], [2, 0, 5], [3, 2, 2]]))
assert columns.tolist() == [1, 0, 2]
assert not stand_ins("scipy.optimize")

# torch's compiler knows the marks of transformers once somebody imports it
marked = modeling_utils.PreTrainedModel.can_record_outputs.fget
import torch._dynamo
from torch._dynamo import trace_rules
assert id(marked) in trace_rules._allowed_callable_ids
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.ones(2)).tolist() == [2, 2]

# another import of a deferred module replaces its stand-ins
import torch.distributed.tensor as real
names = ("torch.distributed.tensor", "torch.distributed.tensor.placement_types", "torch.distributed.tensor._utils")
assert not stand_ins(*[name for name in names if name in sys.modules])

# models that were not asked for
config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1)
model = transformers.GPT2LMHeadModel(config).eval()
out = model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None)
assert out.shape == (1, 5)
print(json.dumps(sorted(dir(transformers))))
"""
NAMES = "import json, transformers; print(json.dumps(sorted(transformers.__all__)))"


def test_transformers_is_whole_afterwards() -> None:
    assert len(json.loads(python(WHOLE).stdout)) > 3000
    assert all(python(LIGHT_NAMES).stdout == python(NAMES).stdout for _ in range(2))  # learned, then remembered


LIGHT_NAMES = """
import json
from streamchat.models.light.libraries import import_libraries
import_libraries("llama")
import sys, transformers
print(json.dumps(sorted(transformers.__all__)))
"""

PLANS = """
import sys
from streamchat.models.light.libraries import import_libraries, REGISTRIES
import_libraries("llama")
assert "torch.distributed.tensor" not in sys.modules
if any(name.partition(".")[0] and name.rpartition(".")[0] in sys.modules for name in REGISTRIES):
    from transformers.distributed import mixin
    assert "colwise" in mixin.ALL_PARALLEL_STYLES and "grouped_gemm" in mixin.ALL_PARALLEL_STYLES
    assert type(mixin.ALL_PARALLEL_STYLES).__name__ == "ParallelInterface"
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.tp_plan = {"model.layers.*.mlp.up_proj": "colwise"}
    try:
        model.tp_plan = {"model.layers.*.mlp.up_proj": "no such style"}
    except ValueError as error:
        assert "no such style" in str(error)
    else:
        raise SystemExit("a wrong plan was accepted")
"""


def test_a_registry_is_complete_when_it_is_read() -> None:
    python(PLANS)


BROKEN = """
import sys
from streamchat.models.light import libraries
own = libraries._import_model_code

def failing(model_type):
    own(model_type)
    raise RuntimeError("something new in transformers")

libraries._import_model_code = failing
libraries.import_libraries("llama")
import transformers
from transformers import LlamaForCausalLM, modeling_utils
from streamchat.models.light.deferred import StandIn
assert not any(
    isinstance(value, StandIn)
    for name, module in list(sys.modules.items()) if name.startswith("transformers")
    for value in list(vars(module).values())
)
assert issubclass(LlamaForCausalLM, modeling_utils.PreTrainedModel)
"""


def test_an_unexpected_failure_falls_back_to_the_usual_import() -> None:
    python(BROKEN)


def test_an_imported_transformers_is_left_alone() -> None:
    python(
        "import transformers, sys; from streamchat.models.light.libraries import import_libraries\n"
        "before = set(sys.modules); import_libraries('llama'); assert set(sys.modules) == before"
    )


@pytest.mark.parametrize("kind", ["no such model", "bert", "None"])
def test_a_model_that_is_no_causal_lm_is_no_error_here(kind: str) -> None:
    program = (
        "import sys; from streamchat.models.light.libraries import import_libraries; import_libraries(sys.argv[1])"
    )
    done = python(
        f"{program}\nassert 'sympy' not in sys.modules and 'transformers.modeling_utils' in sys.modules", kind
    )
    assert not done.stderr


# --- stand-ins -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `pretend` that takes the part of transformers, and a library `slowlib`."""
    package = tmp_path / "pretend"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "user.py").write_text("from slowlib import Thing, make, table as renamed\nmade = [make]\n")
    (package / "reexport.py").write_text("from .user import Thing\n")
    (package / "subclass.py").write_text("from slowlib import Thing\nclass Mine(Thing): pass\n")
    (package / "registry.py").write_text("STYLES = {}\n")
    (package / "filler.py").write_text("from .registry import STYLES\nSTYLES['a'] = 1\n")
    (package / "reader.py").write_text("from .registry import STYLES\n")
    (tmp_path / "outsider.py").write_text("from slowlib import Thing\n")
    (tmp_path / "slowlib.py").write_text("class Thing: pass\ndef make(): return Thing()\ntable = {'x': 1}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(deferred, "PACKAGE", "pretend")
    yield tmp_path
    for name in list(sys.modules):
        if name.partition(".")[0] in ("pretend", "slowlib", "outsider"):
            del sys.modules[name]
    import_hooks._watcher.callbacks.clear()


def light(*names: str, registries: Mapping[str, tuple[str, ...]] | None = None) -> list[Any]:
    """Import modules while `slowlib` is deferred."""
    own = builtins.__import__
    with deferred.deferring(frozenset({"slowlib", "pretend.filler"}), registries or {}):
        space: dict[str, Any] = {"__name__": "__main__"}
        for name in names:
            exec(f"import {name}", space)
    assert builtins.__import__ is own
    return [sys.modules[name] for name in names]


@pytest.mark.usefixtures("pretend")
def test_a_name_that_is_not_used_loads_nothing() -> None:
    user, reexport = light("pretend.user", "pretend.reexport")
    assert "slowlib" not in sys.modules
    assert not isinstance(3, user.Thing)
    assert not isinstance(3, (str, user.Thing))
    assert not issubclass(int, user.Thing)
    assert "stand-in for slowlib.Thing" in repr(user.Thing)
    assert "slowlib" not in sys.modules
    made = user.make()  # loads it
    slowlib = import_module("slowlib")
    assert type(made) is slowlib.Thing
    assert user.Thing is slowlib.Thing
    assert reexport.Thing is slowlib.Thing
    assert user.renamed is slowlib.table
    assert user.made[0]().__class__ is slowlib.Thing  # a stand-in in a list stays one


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(
    "use",
    [
        lambda user: user.renamed["x"],
        lambda user: "x" in user.renamed,
        lambda user: len(user.renamed),
        lambda user: list(user.renamed),
        lambda user: user.Thing.__name__,
        lambda user: user.Thing | None,
        lambda user: None | user.Thing,
        lambda user: user.Thing == 3,
        lambda user: hash(user.Thing),
        lambda user: bool(user.renamed),
        lambda user: setattr(user.Thing, "new", 1),
        lambda user: user.renamed.__setitem__("y", 2),
    ],
)
def test_any_use_loads_the_module(use: Any) -> None:
    (user,) = light("pretend.user")
    assert "slowlib" not in sys.modules
    use(user)
    assert user.Thing is sys.modules["slowlib"].Thing


@pytest.mark.usefixtures("pretend")
def test_a_subclass_has_the_real_base() -> None:
    (subclass,) = light("pretend.subclass")
    assert subclass.Mine.__mro__[1] is sys.modules["slowlib"].Thing


@pytest.mark.usefixtures("pretend")
def test_others_import_the_real_module() -> None:
    user, outsider = light("pretend.user", "outsider")
    assert outsider.Thing is sys.modules["slowlib"].Thing is user.Thing
    spec = sys.modules["slowlib"].__spec__
    assert spec is not None
    assert spec.loader is sys.modules["slowlib"].__loader__
    assert type(sys.modules["slowlib"].__loader__).__name__ == "SourceFileLoader"


@pytest.mark.usefixtures("pretend")
def test_a_registry_loads_what_fills_it() -> None:
    registries = {"pretend.registry.STYLES": ("pretend.filler",)}
    (reader,) = light("pretend.reader", registries=registries)
    assert "pretend.filler" not in sys.modules
    assert reader.STYLES["a"] == 1
    assert type(reader.STYLES) is dict


def test_a_watched_module_that_fails_can_be_imported_again(pretend: Path) -> None:
    seen: list[str] = []
    import_hooks.when_imported("slowlib", lambda module: seen.append(module.__name__))
    good = (pretend / "slowlib.py").read_text()
    (pretend / "slowlib.py").write_text("raise ImportError('not yet')\n")
    with pytest.raises(ImportError, match="not yet"):
        import_module("slowlib")
    (pretend / "slowlib.py").write_text(good + "# longer, so that no old bytecode is used\n")
    import_module("slowlib")
    assert seen == ["slowlib"]
    assert import_hooks._watcher not in sys.meta_path
    import_hooks.when_imported("slowlib", lambda module: seen.append("again"))
    assert seen == ["slowlib", "again"]


def test_the_source_of_a_watched_module_can_be_found(pretend: Path) -> None:
    import_hooks.when_imported("slowlib", lambda module: None)
    found = find_spec("slowlib")
    assert found is not None
    loader: Any = found.loader
    assert loader.get_source("slowlib") == (pretend / "slowlib.py").read_text()
    assert loader.is_package("slowlib") is False


# --- the import structure ------------------------------------------------------------------------------------------

Structure = dict[frozenset[str], dict[str, set[str]]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models with one file, next to the code that reads it."""
    folder = tmp_path / "transformers" / "models"
    (folder / "llama").mkdir(parents=True)
    (folder / "llama" / "modeling_llama.py").write_text("__all__ = ['Llama']\n")
    (tmp_path / "transformers" / "import_utils.py").write_text("")
    return folder


def read(models: Path, calls: list[Any], prefix: str | None = None) -> Any:
    """The remembered structure; `calls` gets the arguments of each reading."""
    structure._state.cache_clear()

    def own(path: Any, given: str | None = None) -> Structure:
        calls.append((path, given))
        return {frozenset({"torch"}): {"llama.modeling_llama": {"Llama"}}, frozenset(): {"empty": set()}}

    return structure._remembered(own, models, prefix, models, models.parent / "import_utils.py")


def test_the_structure_is_read_once(models: Path) -> None:
    calls: list[Any] = []
    first, second = read(models, calls), read(models, calls)
    assert first == second
    assert len(calls) == 1
    second[frozenset()]["more"] = {"x"}  # transformers changes what it gets
    assert read(models, calls) == first
    read(models, calls, "models")
    assert calls[1:] == [(models, "models")]


@pytest.mark.parametrize("change", ["edited", "new", "removed", "code"])
def test_a_changed_file_is_read_again(models: Path, change: str) -> None:
    calls: list[Any] = []
    read(models, calls)
    file = models / "llama" / "modeling_llama.py"
    match change:
        case "edited":
            file.write_text("__all__ = ['Llama', 'Other']\n")
        case "new":
            (models / "llama" / "modeling_other.py").write_text("")
        case "removed":
            file.unlink()
        case "code":
            (models.parent / "import_utils.py").write_text("# new\n")
    read(models, calls)
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"state": 1}', "\0", "cut", "wrong"])
def test_a_damaged_memory_is_ignored(models: Path, text: str) -> None:
    calls: list[Any] = []
    expected = read(models, calls)
    (file,) = paths.cache_path("imports", "", "").parent.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    if text == "cut":
        file.write_text(file.read_text()[:-20])
    elif text == "wrong":
        file.write_text(file.read_text().replace("Llama", "Llana"))
    else:
        file.write_text(text)
    assert read(models, calls) == expected
    assert len(calls) == 2


def test_the_real_structure_is_remembered(tmp_path: Path) -> None:
    """The second import reads no file of a model that nobody asked for."""
    program = """
import builtins, sys
from streamchat.models.light.libraries import import_libraries
own, opened = builtins.open, []
builtins.open = lambda file, *rest, **more: opened.append(str(file)) or own(file, *rest, **more)
import_libraries("llama")
builtins.open = own
print(sum("bert" in name and "transformers" in name for name in opened))
"""
    first, second = (int(python(program).stdout) for _ in range(2))
    assert first > 10
    assert second == 0


def test_a_folder_of_the_deny_list_is_named_right() -> None:
    """Each deferred module exists under its name in this or another version, and is not imported by torch itself."""
    done = python("import sys, torch; print('\\n'.join(sys.modules))")
    assert libraries.DEFERRED & set(done.stdout.split()) == set()
