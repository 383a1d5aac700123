"""The one way in for every command line: Hydra words in, a checked `Config` out, bad input as one sentence and exit code 2.

    @entry_point
    def main(cfg: Config) -> None: ...

Imports no torch: submitting is instant.
"""

import atexit
import gc
import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, get_args, get_origin, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from megatron_tower.config import CONF, OBJECTIVES, CausalLMConfig, Config, GRPOConfig, InputError, WPOConfig, check

NODES_FAILED, INTERRUPTED = 3, 128 + signal.SIGINT  # exit codes
LAUNCHER = "hydra_plugins.megatron_tower.SweepLauncher"  # the name under which runtime/sweep.py registers it


class NodeError(Exception):
    """Nodes that can't do the work (runtime/preflight.py): one sentence that names them. Entry points print it and exit with 3."""


def _register() -> None:
    """Let Hydra know every key, so that a command line may set one that no YAML file mentions, and what a sweep is run by."""
    Plugins.instance()  # registers launchers of the names below, which end or wait for ever at the first cell that fails
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="hydra/launcher", name="basic", node={"_target_": LAUNCHER})
    store.store(group="hydra/launcher", name="submitit_slurm", node={"_target_": LAUNCHER, "array_parallelism": 256})
    OmegaConf.register_new_resolver("digest", _digest, replace=True)


def own_words() -> list[str]:
    """The words of this command line; of the job that runs, where it is a sweep's."""
    return list(HydraConfig.get().overrides.task if HydraConfig.initialized() else sys.argv[1:])


def identity(words: Sequence[str]) -> tuple[str, ...]:
    """What a command computes: its words, those left out that say where and for how long it runs."""
    return tuple(sorted(word for word in words if not re.match(r"[+~]*cluster[=.]", word)))


def _digest(words: ListConfig) -> str:
    """A short name for a sweep, in conf/config.yaml."""
    return hashlib.sha256("\n".join(identity(words)).encode()).hexdigest()[:8]


def typed(composed: DictConfig) -> Config:
    """The composed config as dataclasses; raises InputError for a key that was added (`+x=`), a missing value, a broken interpolation."""
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(composed)))
        cfg.phase.objective = _objective(cfg.phase.objective)
    except OmegaConfBaseException as error:
        raise InputError(_one_line(error)) from error
    return cfg


def _objective(options: object) -> CausalLMConfig | WPOConfig | GRPOConfig:
    """The options under the schema that their name selects."""
    name = options.get("name") if isinstance(options, dict) else options
    if name not in OBJECTIVES or not isinstance(options, dict):
        raise InputError(f"phase.objective.name={name} is unknown: use one of {', '.join(OBJECTIVES)}, as in phase.objective.name=wpo")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OBJECTIVES[name]), options))


def load(overrides: list[str]) -> Config:
    """Compose `conf/` with Hydra words, as a command line would, and check it; also inside a Hydra command line (a recipe's phases)."""
    _register()
    hydras, outer = GlobalHydra.instance(), GlobalHydra.instance().hydra
    hydras.hydra = None
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=None):
            cfg = typed(hydra.compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_one_line(error)) from error
    except AssertionError as error:
        raise _absent(error, overrides) from error
    finally:
        hydras.hydra = outer
    check(cfg)
    return cfg


def collect_less() -> None:
    """Start and end sooner: imports make half a million objects that stay, and half the time of a short command was looking for garbage
    among them, again and again and once more at the end, when the system takes all back.
    """
    gc.set_threshold(5_000, 10, 10)
    atexit.register(gc.freeze)


def entry_point(main: Callable[[Config], None]) -> Callable[[], None]:
    """Make `main(cfg)` a Hydra command line: checked config in, one sentence and exit 2 on bad input. With -m: `runtime/sweep.py`."""

    def run(composed: DictConfig) -> None:
        try:
            cfg = typed(composed)
            check(cfg)
            main(cfg)
        except InputError as error:  # here, where Hydra has not yet announced a failed job
            refuse(error)
        except NodeError as error:
            refuse(error, NODES_FAILED)

    def command_line() -> None:
        collect_less()
        _register()
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # a collective launched before a product runs beside it, not after it
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # what can't be composed is raised to us, not printed by Hydra
        try:
            hydra.main(version_base=None, config_path=str(CONF), config_name="config")(run)()
        except (HydraException, OmegaConfBaseException, InputError) as error:  # InputError: of a sweep that can't be
            refuse(error)
        except AssertionError as error:
            refuse(_absent(error, sys.argv[1:]))
        except KeyboardInterrupt:  # before there is anything to save, or between: who saves at a Ctrl-C answers it itself
            sys.exit(INTERRUPTED)

    return command_line


def _absent(error: AssertionError, words: Sequence[str]) -> InputError:
    """What to say of a word below a section that is null, at which OmegaConf fails an assertion; any other is raised again."""
    if not str(error).startswith("Unexpected type for root"):
        raise error
    deep = [word for word in words if word.partition("=")[0].count(".") > 1]
    return InputError(
        f"{' or '.join(deep)} sets a key of a section that is null here: choose what has it, as in phase=grpo or data=debian; "
        "in a recipe set it for one phase, as in \"recipe.overrides.grpo=['phase.rollout.batch_size=8']\""
    )


def refuse(error: Exception, code: int = 2) -> NoReturn:
    """End this process over bad input, exit code 2, or bad nodes: one sentence on stderr."""
    print(f"error: {_one_line(error)}", file=sys.stderr)
    if code == 2 and (job := os.environ.get("MEGATRON_TOWER_JOB")):
        Path(job, "refused").write_text(_one_line(error))
    sys.exit(code)


def _one_line(error: Exception) -> str:
    """An error in one sentence: Hydra's and OmegaConf's with the mend that their users need, not the one for programmers."""
    text = str(error).strip()
    if isinstance(error, InputError | NodeError):
        return text
    first = text.partition("\n")[0]
    cause = str(error.__cause__).strip().partition("\n")[0] if error.__cause__ else ""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} is unknown: use one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} can't be read: words are key=value, a value of more than letters, digits and ./_- in quotes, \"key='a=b'\""
        )
    if found := re.match(r"Could not override '(.+)'", first):
        return _no_key(found[1])
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and error.full_key:
        return _no_key(error.full_key)
    if found := re.match(r"Ambiguous value for argument '(.+)'", first):
        return f"{found[1]} names several values: add -m to try each of them, or give one"
    if found := re.match(r"Error merging override (.+)", first):
        return f"{found[1]}: {cause}"
    key = re.search(r"full_key: (\S+)", text)
    return f"{first} (at {key[1]})" if key else first


def _no_key(key: str) -> str:
    """What to say of a key that no config of this choice has."""
    known = dict(_keys(Config, ""))
    if get_origin(known.get(key.rpartition(".")[0])) is dict:
        return f"{key} is not there yet: write +{key}=... to add it"
    if owners := [name for name, kind in OBJECTIVES.items() if key in dict(_keys(kind, "phase.objective."))]:
        return f"{key} is no key of this objective: use it with {' or '.join(f'phase={name}' for name in owners)}"
    if key in known:
        return f"{key} can't be set here"
    near = [name for name in known if name.endswith(f".{key}")]
    if not 1 <= len(near) <= 3:
        near = get_close_matches(key, [name for name in known if name.count(".") == key.count(".")], 1)
    mend = f"did you mean {' or '.join(near)}?" if near else "all keys stand in megatron_tower/config.py"
    return f"{key} is no key: {mend}"


def _keys(kind: type, path: str) -> Iterator[tuple[str, object]]:
    """Every key below a dataclass of the schema, with its type."""
    for name, hint in get_type_hints(kind).items():
        yield path + name, hint
        for inner in (hint, *get_args(hint)):
            if is_dataclass(inner):
                yield from _keys(inner, f"{path}{name}.")
