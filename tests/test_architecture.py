"""The shape of the project, read from its source: who imports whom, and the three "ones".

One UNet call site, one sampling loop, one training loop; no gradients turned off in the core; no
call that runs what a file or a string says. Each rule is also shown to catch a planted offence.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm_pipeline"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "train").glob("*.py"))

SHARED = {
    "", "caches", "errors", "grid", "images", "memory", "replacing", "request", "request_xl",
    "too_large", "values",
}  # fmt: skip
"""What any layer but the core may use: values, errors, pictures."""

FRONT = {
    "pipeline",
    "pipeline_xl",
    "two_texts",
    "checkpoints",
    "drawing",
    "canvas",
    "image_prompts",
    "loading",
    "model_checks",
    "running",
    "randomness",
    "stock_arguments",
    "stock_loaders",
}
"""The files that together are the pipeline."""

FILES = {"metadata", "picture_files"}
"""What a picture file holds, and how it is written and read."""

ALLOWED = {
    "diffusion": {"errors"},
    "models": {"diffusion", *SHARED},
    "lora": {"models", "diffusion", *SHARED},
    "tasks": {"diffusion", *SHARED},
    "analysis": {"models", "diffusion", *SHARED},
    "data": SHARED,
    "evaluation": {"pipeline", "analysis", "models", "data", "grid", *SHARED},
    "training": {"lora", "models", "data", "diffusion", "processes", *SHARED},
    "processes": {"errors"},
    "batch": {"cli", "commands", "processes", *FILES, *SHARED},
    "commands": {"evaluation", "data", "lora", "models", "pipeline", "training", *FILES, *SHARED},
    "cli": {"commands", *SHARED},
    "metadata": SHARED,
    "picture_files": {"metadata", *SHARED},
    "grid": SHARED,
    "memory": {"errors", "values"},
    "caches": set(),
    "replacing": {"errors"},
    "too_large": {"errors"},
    "values": {"errors"},
    "request": {"errors", "values"},
    "request_xl": {"errors", "request", "values"},
    "images": {"errors", "values"},
    "errors": set(),
    "": {"pipeline", "pipeline_xl", "checkpoints", *SHARED},
    **{name: {"tasks", "lora", "models", "diffusion", *SHARED, *FRONT} for name in FRONT},
}
"""Which layers the files of each layer may import, besides their own."""

PUBLIC = (
    "LatentDiffusionPipeline",
    "LatentDiffusionXLPipeline",
    "Memory",
    "Request",
    "UserError",
    "load",
)
"""What the package itself offers; whoever may import the package may import these."""

ALLOWED_IN_TRAIN = {"training", "pipeline", "evaluation", "data", *SHARED}

# A layer that must stay light, and the only outside packages that it may import.
OUTSIDE = {
    "diffusion": {"torch"},
    "tasks": {"torch"},
    "data/world": {"numpy", "PIL"},
    "request.py": {"torch"},  # for types only; that no import happens is tested below
    "request_xl.py": {"torch"},
    "errors.py": set(),
    "values.py": set(),
    "memory.py": set(),
    "replacing.py": set(),
    "too_large.py": set(),
    "cli.py": set(),
}

DANGEROUS_CALLS = {"torch.load", "yaml.load", "os.system", "os.popen", "eval", "exec", "compile"}
DANGEROUS_IMPORTS = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}


def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(module: ast.AST, package: str) -> Iterator[str]:
    """Full names of everything imported anywhere in `module`, which lies in `package`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layers(module: ast.AST, package: str) -> set[str]:
    """The layers of ldm_pipeline that `module` imports; "" is the package itself."""
    found = set()
    for name in imports(module, package):
        head, _, rest = name.partition(".")
        if head == "ldm_pipeline":
            layer = rest.partition(".")[0]
            public = layer in PUBLIC
            if layer and not public and layer != "__version__":
                found.add(layer)
    return found


def layer_of(path: Path) -> str:
    """The layer that a file of the package belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def package_of(path: Path) -> str:
    """The dotted package that a file lies in, for its relative imports."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such an expression; an unnamed beginning is left out."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def calls(module: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call in `module`, with the dotted name of what is called."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def calls_a_unet(module: ast.AST) -> bool:
    """Whether a UNet is called: `unet(…)`, `self.unet(…)`, `pipe.unet.forward(…)`."""
    return any(
        name.removesuffix(".forward").rpartition(".")[2].lower() in ("unet", "teacher_unet")
        for name, _ in calls(module)
    )


def loops_over_steps(module: ast.AST) -> bool:
    """Whether a loop calls a sampler's or scheduler's `step(…)`, or a solver."""
    return any(
        name in ("step", "solver")
        or name.endswith(("scheduler.step", "sampler.step", "course.step"))
        for loop in ast.walk(module)
        if isinstance(loop, ast.For | ast.While)
        for name, _ in calls(loop)
    )


def trains(module: ast.AST) -> bool:
    """Whether something is learnt: `….backward(…)`, or an optimiser's step."""
    return any(
        name.endswith((".backward", "optimiser.step", "optimizer.step"))
        for name, _ in calls(module)
    )


def turns_gradients_off(module: ast.AST) -> bool:
    """Whether no_grad, inference_mode or set_grad_enabled is named."""
    forbidden = {"no_grad", "inference_mode", "set_grad_enabled"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in forbidden)
        or (isinstance(node, ast.Name) and node.id in forbidden)
        for node in ast.walk(module)
    )


def is_dangerous(module: ast.AST) -> bool:
    """Whether it may run what a file or a string says."""
    named = {name.partition(".")[0] for name in imports(module, "")}
    return bool(named & DANGEROUS_IMPORTS) or any(
        name in DANGEROUS_CALLS
        or any(
            k.arg in ("shell", "allow_pickle", "trust_remote_code")
            and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            for k in call.keywords
        )
        for name, call in calls(module)
    )


def where(rule: Callable[[ast.AST], bool]) -> set[str]:
    """The files of the package and of train/ that `rule` finds."""
    return {path.relative_to(ROOT).as_posix() for path in [*SOURCES, *SCRIPTS] if rule(tree(path))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_in_one_direction(path: Path) -> None:
    layer = layer_of(path)
    assert layer in ALLOWED, f"say in ALLOWED what the new layer {layer!r} may import"
    extra = layers(tree(path), package_of(path)) - {layer} - ALLOWED[layer]
    assert not extra, f"{layer} must not import {sorted(extra)}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_only_what_is_for_them_and_never_each_other(path: Path) -> None:
    module = tree(path)
    assert layers(module, "") <= ALLOWED_IN_TRAIN
    heads = {name.partition(".")[0] for name in imports(module, "")}
    assert not heads & {"train", *(script.stem for script in SCRIPTS)}


@pytest.mark.parametrize("place", OUTSIDE)
def test_light_layers_import_no_other_packages(place: str) -> None:
    below = PACKAGE / place
    for path in [below] if below.is_file() else sorted(below.rglob("*.py")):
        heads = {name.partition(".")[0] for name in imports(tree(path), package_of(path))}
        extra = heads - OUTSIDE[place] - sys.stdlib_module_names - {"ldm_pipeline"}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_there_is_one_place_that_calls_a_unet() -> None:
    assert where(calls_a_unet) == {"ldm_pipeline/models/unet.py"}


def test_there_is_one_sampling_loop() -> None:
    """Beside it only the teacher's way down in a distillation, on which each sample has levels of
    its own, and which draws nothing."""
    teacher = "ldm_pipeline/diffusion/consistency.py"
    assert where(loops_over_steps) == {"ldm_pipeline/diffusion/loop.py", teacher}


def test_there_is_one_training_loop() -> None:
    assert where(trains) == {"ldm_pipeline/training/engine.py"}


def test_the_core_leaves_gradients_to_its_caller() -> None:
    core = {path for path in where(turns_gradients_off) if "/diffusion/" in path}
    assert core == set()


def test_nothing_runs_what_a_file_or_a_string_says() -> None:
    assert where(is_dangerous) == set()


@pytest.mark.parametrize(
    ("rule", "offence", "innocent"),
    [
        (calls_a_unet, "y = self.unet(x, t)", "y = unet.config.sample_size"),
        (calls_a_unet, "pipe.unet.forward(x)", "bind(unet, embeds)"),
        (loops_over_steps, "for t in times:\n    x = step(x, t)", "x = step(x, t)"),
        (loops_over_steps, "for t in times:\n    x = solver(x, t)", "x = solver(x, t)"),
        (loops_over_steps, "while x:\n    pipe.scheduler.step(x)", "for x in y:\n    steps(x)"),
        (trains, "loss.backward()", "torch.autograd.grad(loss, x)"),
        (trains, "optimizer.step()", "scheduler.step()"),
        (turns_gradients_off, "with torch.no_grad():\n    f()", "x.requires_grad_(True)"),
        (turns_gradients_off, "@no_grad()\ndef f(): ...", "x.detach()"),
        (is_dangerous, "torch.load(f, weights_only=True)", "load_file(f)"),
        (is_dangerous, "import pickle", "import json"),
        (is_dangerous, "eval('1')", "model.eval()"),
        (is_dangerous, "yaml.load(f)", "yaml.safe_load(f)"),
        (is_dangerous, "subprocess.run(c, shell=True)", "subprocess.run(c, shell=False)"),
        (is_dangerous, "numpy.load(f, allow_pickle=x)", "numpy.load(f)"),
    ],
)
def test_each_rule_catches_an_offence_and_only_that(
    rule: Callable[[ast.AST], bool], offence: str, innocent: str
) -> None:
    assert rule(ast.parse(offence))
    assert not rule(ast.parse(innocent))


@pytest.mark.parametrize(
    ("line", "layer"),
    [
        ("from ldm_pipeline.pipeline import load", "pipeline"),
        ("from ldm_pipeline import pipeline", "pipeline"),
        ("import ldm_pipeline.pipeline as p", "pipeline"),
        ("from ..pipeline import load", "pipeline"),
        ("from .. import pipeline", "pipeline"),
        ("def f():\n    from ldm_pipeline.pipeline import load", "pipeline"),
    ],
)
def test_an_import_is_seen_in_every_spelling(line: str, layer: str) -> None:
    assert layer in layers(ast.parse(line), "ldm_pipeline.diffusion")


@pytest.mark.parametrize(
    "module",
    ["ldm_pipeline", "ldm_pipeline.cli", "ldm_pipeline.request", "ldm_pipeline.batch.__main__"],
)
def test_the_door_opens_without_heavy_packages(module: str) -> None:
    heavy = ("torch", "numpy", "PIL", "diffusers", "transformers")
    script = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("files", "most"), [(SOURCES, 450), (SCRIPTS, 80)])
def test_files_stay_short_enough_to_read(files: list[Path], most: int) -> None:
    assert files
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in files
    }
    assert {name: n for name, n in lengths.items() if n > most} == {}


@pytest.mark.parametrize("first", ["pipeline", "training.latent_diffusion"])
def test_imports_say_nothing(first: str) -> None:
    """What stock parts say when they are imported tells a user nothing."""
    done = subprocess.run(
        [sys.executable, "-c", f"import ldm_pipeline.{first}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
