"""The ``model`` section of a configuration: which encoder, and the arguments of its class as settings.

Nothing here imports torch until a class other than M3 is named.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, field, fields, make_dataclass
from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

# Its one way to the parameters of a class with their texts, those behind **kwargs included; it has no public name.
from jsonargparse._parameter_resolvers import ParamData, get_signature_parameters

from mmfast.errors import UserError
from mmfast.training.config import Config, ModelConfig
from mmfast.training.settings import fits
from mmfast.wording import guess, one_of

if TYPE_CHECKING:
    from mmfast.models import Encoder

M3 = ModelConfig.encoder
# Settings of the section that are no arguments of the encoder.
SHARED = ("encoder", "projector")
IMPORTABLE = "a class that can be imported"
_SCALARS = (int, float, bool, str, type(None))


def encoder_name(values: Any) -> str:
    """The class that nested settings name, such as those of a file or a checkpoint; M3 where they name none."""
    model = values.get("model") if isinstance(values, Mapping) else None
    name = model.get("encoder") if isinstance(model, Mapping) else None
    return name if isinstance(name, str) else M3


@cache
def config_type(encoder: str) -> type[Config]:
    """:class:`Config` with a ``model`` section for an encoder's class: its arguments, ``encoder`` and ``projector``.

    Raises:
        UserError: as :func:`encoder_class`; an argument that bears the name of another setting.
    """
    return Config if encoder == M3 else _with_model(_model_type(encoder))


def open_config_type() -> type[Config]:
    """:class:`Config` with a ``model`` section that takes anything, for when only a checkpoint knows the class."""
    return _with_model(dict[str, Any])


def _with_model(kind: Any) -> type[Config]:
    required = any(not _has_default(f) for f in fields(kind)) if isinstance(kind, type) else False
    model = field() if required else field(default_factory=get_origin(kind) or kind)
    made = make_dataclass("Config", [("model", kind, model)], bases=(Config,), kw_only=True)
    made.__doc__ = Config.__doc__
    return made


def _has_default(f: Any) -> bool:
    return f.default is not f.default_factory  # both are MISSING where there is none


def _model_type(encoder: str) -> type:
    kind = encoder_class(encoder)
    own = _arguments(kind, encoder)
    shared = {p.name: p for p in get_signature_parameters(ModelConfig, None) if p.name in SHARED}
    made = make_dataclass(
        "ModelConfig",
        [
            ("encoder", str, field(default=encoder)),
            *((name, *_setting(p)) for name, p in own.items()),
            ("projector", list[int], field(default_factory=lambda: ModelConfig().projector)),
        ],
        kw_only=True,
    )
    texts = [(p.name, " ".join(p.doc.split())) for p in (*shared.values(), *own.values()) if p.doc]
    title = (inspect.getdoc(kind) or kind.__name__).partition("\n")[0]
    made.__doc__ = "\n".join([title, "", "Args:", *(f"    {name}: {text}" for name, text in texts)])
    return made


def _arguments(kind: type, encoder: str) -> dict[str, ParamData]:
    """Constructor arguments that are settings: all but ``features`` and those whose default YAML cannot say."""
    given = {p.name: p for p in get_signature_parameters(kind, None)}
    if given.pop("features", None) is None:
        raise UserError(
            f"config: model.encoder must be a class whose constructor takes features, a dict modality -> size, got "
            f"{encoder}, which takes {', '.join(given) or 'nothing'}"
        )
    for name in SHARED:
        if name in given:
            raise UserError(
                f"config: model.encoder must be a class without an argument {name}, which is a setting beside it, "
                f"got {encoder}"
            )
    return {name: p for name, p in given.items() if p.default is inspect.Parameter.empty or _plain(p.default)}


def _plain(value: Any) -> bool:
    """Whether YAML and a checkpoint give the value back: numbers, texts, true, false, null, lists, mappings."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return type(value) in _SCALARS


def _setting(p: ParamData) -> tuple[Any, Any]:
    """Type and field of an argument's setting; tuples are lists in YAML, and marked to become tuples again."""
    kind = _type(p.annotation)
    marks = {"tuple": any(o is tuple or get_origin(o) is tuple for o in _options(p.annotation))}
    if p.default is inspect.Parameter.empty:
        return kind, field(metadata=marks)
    marks["tuple"] |= isinstance(p.default, tuple)
    default = _listed(p.default)
    if not fits(default, kind):
        kind = kind | None if default is None else Any
    return kind, field(default_factory=lambda: deepcopy(default), metadata=marks)


def _listed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [*map(_listed, value)]
    return {key: _listed(item) for key, item in value.items()} if isinstance(value, dict) else value


def _options(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _type(kind: Any) -> Any:
    """The type of a setting for an argument of this annotation: :data:`~typing.Any` where no setting can have it."""
    origin, options = get_origin(kind), get_args(kind)
    if kind in _SCALARS or (origin is Literal and all(type(option) in _SCALARS for option in options)):
        return kind
    if origin is Annotated:
        return _type(options[0])
    if origin in (Union, types.UnionType):
        inner = [_type(option) for option in options]
        return Any if Any in inner else reduce(or_, inner)
    if list in (kind, origin) or tuple in (kind, origin) or origin is Sequence:
        inner = {_type(option) for option in options if option is not Ellipsis}
        return list[inner.pop() if len(inner) == 1 else Any]
    if dict in (kind, origin) or origin is Mapping:
        return dict[str, _type(options[1]) if options[:1] == (str,) else Any]
    return Any


def own_settings(model: Any) -> dict[str, Any]:
    """The encoder's own arguments in a model section, as its class wants them."""
    values = {name: value for name, value in asdict(model).items() if name not in SHARED}
    tuples = {f.name for f in fields(model) if f.metadata.get("tuple")}
    return {name: tuple(v) if name in tuples and isinstance(v, list) else v for name, v in values.items()}


def encoder_class(encoder: str) -> type[Encoder]:
    """The class that ``model.encoder`` names, imported; modules in the current directory are found, too.

    Args:
        encoder: name of a class of :mod:`mmfast.models.encoders`, or an import path such as
            ``my.module.MyEncoder``.

    Raises:
        UserError: no such module, one that cannot be imported, no such class in it, or one that is no encoder.
    """
    from mmfast.models import Encoder, encoders

    path, _, name = encoder.rpartition(".")
    published = [n for n in encoders.__all__ if _is_encoder(getattr(encoders, n), Encoder)]
    if "." not in encoder:
        if name not in published:
            raise refusal(
                f"{one_of(published)}, or an import path such as my.module.MyEncoder",
                encoder,
                guess(name, published),
            )
        return getattr(encoders, name)
    if not all(part.isidentifier() for part in encoder.split(".")):
        raise refusal("an import path such as my.module.MyEncoder", encoder)
    module = _module(path, encoder)
    found = getattr(module, name, None)
    if found is None:
        there = [n for n, value in vars(module).items() if _is_encoder(value, Encoder)]
        raise refusal(IMPORTABLE, encoder, f": {path} has no {name}{guess(name, there)}")
    if not (inspect.isclass(found) and issubclass(found, Encoder)):
        what = "class" if inspect.isclass(found) else type(found).__name__
        raise refusal("a subclass of mmfast.models.Encoder", encoder, f", a {what}")
    for method in ("encode", "fuse"):
        if getattr(found, method) is getattr(Encoder, method):
            raise refusal("a class with encode and fuse", encoder, f", which has no {method}")
    return found


def _is_encoder(value: Any, base: type) -> bool:
    return inspect.isclass(value) and issubclass(value, base) and value is not base


def _module(path: str, encoder: str) -> types.ModuleType:
    # As ``python -m mmfast`` has it already; the program ``mmfast`` has its own folder in that place. Worker
    # processes are given the path of the process that starts them.
    here = os.getcwd()
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name} in {here}, nor where Python looks"
        else:
            reason = f"{path} raises {_raised(error, path)}"
        raise refusal(IMPORTABLE, encoder, f": {reason}") from error


@contextlib.contextmanager
def blamed(encoder: str, module: str, rule: str) -> Iterator[None]:
    """What an encoder's class raises within the context becomes a sentence: it must be a class of this ``rule``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise refusal(f"a class {rule}", encoder, f": it raises {_raised(error, module)}") from error


def refusal(rule: str, encoder: str, more: str = "") -> UserError:
    """The error of a class that does not keep a rule; ``more`` is said behind its name."""
    return UserError(f"config: model.encoder must be {rule}, got {encoder or 'nothing'}{more}")


def _raised(error: BaseException, module: str) -> str:
    """What a user's code raised, and in which line of the module, in words for a sentence."""
    file = os.sep + module.replace(".", os.sep)
    ends = (f"{file}.py", os.path.join(file, "__init__.py"))
    lines = [call for call in traceback.extract_tb(error.__traceback__) if call.filename.endswith(ends)]
    where = f" ({os.path.basename(lines[-1].filename)}, line {lines[-1].lineno})" if lines else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{text and f': {text}'}{where}"
