"""Which world a parameter name belongs to, and how names (and fused modules) pass from one world to another.

=========== ==================================================================== ==========================
world       names                                                                spoken by
=========== ==================================================================== ==========================
hf          one model's own paths: ``model.layers.0.self_attn.q_proj.weight``    PEFT, MLX, loralib
diffusers   component and path: ``unet.``, ``transformer.``, ``text_encoder.``   diffusers
authors     ``diffusion_model.`` and ``text_encoders.<name>.transformer.``       ComfyUI, ai-toolkit
kohya       flattened names that nothing resolved yet: ``lora_unet_a_b.weight``  sd-scripts, LyCORIS
gguf        tensors of llama.cpp without head counts: ``blk.0.attn_q.weight``    llama.cpp
numbered    modules counted as a trainer visited them: ``unet:0.weight``         cloneofsimo/lora
=========== ==================================================================== ==========================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import MissingScaleError, NameUnresolvedError, UnsupportedError
from loratools.formats import bfl, sgm
from loratools.formats.names import Lookup, flat, shipped
from loratools.io.base import Base

COMPONENTS = ("unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")
AUTHORS = ("diffusion_model.", "text_encoders.")
PREFIX = re.compile(r"(lora_(?:prior_unet|prior_te|[a-z0-9]+)|lycoris)_(.+)")
_HEADS = {
    "unet": ("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding", "add_embedding"),
    "transformer": ("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder",
                    "time_text_embed", "norm_out", "proj_out"),
    "text_encoder": ("text_model", "text_projection"),
    "diffusion_model": ("input_blocks", "output_blocks", "middle_block", "time_embed", "label_emb", "out",
                        "double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in",
                        "final_layer"),
}  # fmt: skip
_COMPONENT_OF = {head: component for component, heads in _HEADS.items() for head in heads}
_NUMBERED = re.compile(r"(unet|text_encoder|list):\d+\.")
_OTHER_ROWS = ("gguf", "torchtune")  # namespaces whose rows may lie in another order: a new name is not enough
_CLIP_L, _CLIP_G, _T5 = (f"text_encoders.{te}.transformer." for te in ("clip_l", "clip_g", "t5xxl"))


def world(name: str) -> str:
    """Return the world of a parameter name."""
    module = name.rpartition(".")[0] or name
    if "." not in module and PREFIX.match(module):
        return "kohya"
    if name.startswith(AUTHORS):
        return "authors"
    if name.startswith("blk."):
        return "gguf"
    if _NUMBERED.match(name):
        return "numbered"
    head, _, rest = name.partition(".")
    return "diffusers" if head in COMPONENTS and not re.match(r"(h|wte|wpe|ln_f|word_embeddings)\.", rest) else "hf"


def worlds(names: Iterable[str]) -> str:
    """Return the one world of all names, or their worlds joined by ``+``."""
    return "+".join(sorted({world(name) for name in names}))


def component_of(path: str) -> str | None:
    """Return the component that a bare module path of a diffusion model lies in, or None."""
    return _COMPONENT_OF.get(path.partition(".")[0])


def unflattened(stems: Iterable[str], base: Base | None, given: Mapping[str, str]) -> dict[str, str]:
    """Return stem -> dotted module name, for stems that the file's own table, the base or a known family resolves."""
    own = None if base is None else Lookup(_paths(base), any_number=False)
    found: dict[str, str] = {}
    for stem in stems:
        match = PREFIX.fullmatch(stem)
        if stem in given:
            found[stem] = given[stem]
        elif match:
            flattened = flat(match[2])  # some trainers leave dots
            path = (own(flattened) if own else None) or shipped()(flattened)
            if path is not None:
                found[stem] = _home(match[1], path) + path
    return found


def _paths(base: Base) -> Iterable[str]:
    for name in base:
        path = (
            name.removeprefix("model.").removeprefix("diffusion_model.") if ".diffusion_model." in f".{name}" else name
        )
        yield path.rpartition(".")[0]


def _home(prefix: str, path: str) -> str:
    """Return the head that a resolved path belongs under."""
    component = component_of(path)
    if prefix.startswith(("lora_te", "lora_prior_te")):
        encoder = component == "text_encoder" or path.startswith(("encoder.block.", "shared"))
        suffix = "" if prefix[-1] in "e1" else f"_{prefix[-1]}"
        return f"text_encoder{suffix}." if encoder else ""
    if component is None and prefix == "lora_unet":
        return "diffusion_model."
    return "" if component is None else f"{component}."


def ready(adapter: Adapter, target: str, *, format: str, component: str = "") -> Adapter:
    """Return the adapter in a world's words (``hf``, ``diffusers``, ``authors``), for a writer of ``format``.

    An adapter that came from ``format`` is returned as it is. Raises :class:`NameUnresolvedError` for names that cannot
    be translated, :class:`MissingScaleError` if the source does not say its scale.
    """
    if adapter.meta.source == format:
        return adapter
    if not adapter.meta.scaled:
        raise MissingScaleError(
            f"{adapter.meta.source} files do not say how strongly their factors act, and {format} files must",
            expected="the factor that its program multiplies b @ a with",
            hint="--scale NUMBER (alpha / rank of the training)",
        )
    theirs = adapter.meta.namespace in _OTHER_ROWS
    unresolved = [name for name in adapter if theirs or world(name) in ("kohya", "gguf", "numbered")]
    if unresolved:
        raise NameUnresolvedError(
            f"{len(unresolved)} names of {adapter.meta.source} belong to no model known here",
            got=", ".join(unresolved[:3]),
            hint="--base MODEL reads the names from the model, --rename REGEX=REPL says them by hand",
        )
    translate = {"hf": _to_hf, "diffusers": _to_diffusers, "authors": _to_authors}[target]
    updates, renamed = translate(adapter.updates, component)
    turned = {
        renamed[n]: {"stored": e["stored"]} for n, e in adapter.meta.layout.items() if "stored" in e and n in renamed
    }
    return replace(adapter, updates=updates, meta=replace(adapter.meta, layout=turned, namespace=target, leftover={}))


Translated = tuple[dict[str, Update], dict[str, str]]  # updates, and old -> new name of those that only changed names


def _to_hf(updates: Mapping[str, Update], component: str) -> Translated:
    """One component's paths, without its name."""
    if all(world(name) == "hf" for name in updates):
        return dict(updates), {name: name for name in updates}
    spoken, _ = _to_diffusers(updates, component)
    heads = {name.partition(".")[0] for name in spoken}
    if len(heads) > 1 and component not in heads:
        raise UnsupportedError(
            "the adapter acts on several models, and this format holds one",
            got=", ".join(sorted(heads)),
            hint=f"--set component={min(heads)} writes that one alone",
        )
    head = component if len(heads) > 1 else heads.pop()
    kept = {name: u for name, u in spoken.items() if name.startswith(f"{head}.")}
    return {name.partition(".")[2]: u for name, u in kept.items()}, {}


def _to_diffusers(updates: Mapping[str, Update], component: str) -> Translated:
    done: dict[str, Update] = {}
    renamed: dict[str, str] = {}
    flux = any(bfl.is_authors(name.removeprefix(AUTHORS[0]).rpartition(".")[0]) for name in updates)
    for name, u in updates.items():
        module, _, leaf = name.rpartition(".")
        match world(name):
            case "diffusers":
                found = {name: u}
            case "authors":
                found = {f"{m}.{leaf}": v for m, v in _from_authors(module, u, flux).items()}
            case _:
                found = {f"{_component(module, component)}.{name}": u}
        done |= found
        renamed |= {name: next(iter(found))} if len(found) == 1 else {}
    return done, renamed


def _component(module: str, said: str) -> str:
    found = said or component_of(module) or ""
    if found not in COMPONENTS:
        raise NameUnresolvedError(
            "the name does not say which part of a pipeline it belongs to",
            parameter=module,
            hint=f"--set component=NAME, one of {', '.join(COMPONENTS)}",
        )
    return found


def _from_authors(module: str, u: Update, flux: bool) -> dict[str, Update]:
    second = "text_encoder_2." if flux else "text_encoder_3."
    for head, new in ((_CLIP_L, "text_encoder."), (_CLIP_G, "text_encoder_2."), (_T5, second)):
        if module.startswith(head):
            return {new + module.removeprefix(head): u}
    path = module.removeprefix(AUTHORS[0])
    if (unet := sgm.to_diffusers(path)) is not None:
        return {f"unet.{unet}": u}
    if (parts := bfl.to_diffusers(path, u)) is not None:
        return {f"transformer.{part}": v for part, v in parts.items()}
    raise NameUnresolvedError(
        "no table says what diffusers calls this module",
        parameter=module,
        expected="Stable Diffusion 1.5, 2, XL or Flux",
        hint="--rename REGEX=REPL, to names that begin with a component: transformer.",
    )


def _to_authors(updates: Mapping[str, Update], component: str) -> Translated:
    spoken, _ = _to_diffusers({n: u for n, u in updates.items() if world(n) != "authors"}, component)
    done: dict[str, Update] = {n: u for n, u in updates.items() if world(n) == "authors"}
    attended = sgm.attended_levels(name.removeprefix("unet.") for name in spoken)
    flux = [name for name in spoken if name.startswith("transformer.")]
    for name, u in spoken.items():
        if name in flux:
            continue
        module, _, leaf = name.rpartition(".")
        done[f"{_authors_name(module, attended)}.{leaf}"] = u
    return done | fused_flux({n: spoken[n] for n in flux}), {}


def fused_flux(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Return Flux updates under the authors' names, projections fused; NameUnresolvedError for other modules."""
    done: dict[str, Update] = {}
    for leaf in ("weight", "bias"):
        some = {
            n.removeprefix("transformer.").removesuffix(f".{leaf}"): u
            for n, u in updates.items()
            if n.endswith(f".{leaf}")
        }
        found, unknown = bfl.to_authors(some)
        if unknown:
            raise NameUnresolvedError("no table says what Flux' authors call this module", parameter=unknown[0])
        done |= {f"diffusion_model.{path}.{leaf}": u for path, u in found.items()}
    return done


def _authors_name(module: str, attended: set[int]) -> str:
    head, _, path = module.partition(".")
    t5 = path.startswith(("encoder.", "shared"))
    if head.startswith("text_encoder"):
        return {"text_encoder": _CLIP_L, "text_encoder_2": _T5 if t5 else _CLIP_G}.get(head, _T5) + path
    unet = sgm.to_authors(path, attended) if head == "unet" else None
    if unet is None:
        raise NameUnresolvedError(
            "no table says what the model's authors call this module",
            parameter=module,
            expected="Stable Diffusion 1.5, 2, XL or Flux",
            hint="--rename REGEX=REPL, to names that begin with diffusion_model.",
        )
    return f"diffusion_model.{unet}"
