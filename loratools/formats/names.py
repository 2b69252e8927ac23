"""Module names with and without their dots.

kohya writes ``down_blocks.0.attentions.1`` as ``down_blocks_0_attentions_1``, which no rule can undo, because the parts
hold underscores themselves. A known model can: its names are flattened and looked up. The names come from the base
(``--base``), or from the families below, written as templates: ``{a,b}`` is a choice and ``#`` any number, so that one
line stands for every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from loratools.errors import MismatchError, NameUnresolvedError, UsageError

_ATTENTION = (
    "{proj_in,proj_out,norm,transformer_blocks.#.{attn{1,2}.{to_q,to_k,to_v,to_out.#},ff.net.{#,#.proj},norm{1,2,3}}}"
)
_RESNET = "{conv{1,2},norm{1,2},time_emb_proj,conv_shortcut}"
_CLIP_LAYER = "{self_attn.{q,k,v,out}_proj,mlp.fc{1,2},layer_norm{1,2}}"
_MLP = "mlp.{{gate,up,down,gate_up}_proj,fc{1,2},c_fc,c_proj}"
_LAYER = f"{{self_attn.{{{{q,k,v,o,qkv,out}}_proj,dense}},{_MLP},{{input,post_attention}}_layernorm}}"
_JOINT = "attn.{to_q,to_k,to_v,to_out.#,add_q_proj,add_k_proj,add_v_proj,to_add_out,norm_q,norm_k}"

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "Stable Diffusion (1.5, 2, XL) UNet, as diffusers names it": (
        f"{{down_blocks,up_blocks}}.#.{{attentions.#.{_ATTENTION},resnets.#.{_RESNET}}}",
        f"mid_block.{{attentions.#.{_ATTENTION},resnets.#.{_RESNET}}}",
        "{down_blocks.#.downsamplers.#,up_blocks.#.upsamplers.#}.conv",
        "{conv_in,conv_out,conv_norm_out,{time,add}_embedding.linear_#}",
    ),
    "Stable Diffusion (1.5, 2, XL) UNet, as its authors name it": (
        f"{{{{input,output}}_blocks.#.#,middle_block.#}}.{_ATTENTION}",
        "{{input,output}_blocks.#.#,middle_block.#}.{in_layers.#,out_layers.#,emb_layers.#,skip_connection,op,conv}",
        "{input_blocks.#.#,time_embed.#,label_emb.#.#,out.#}",
    ),
    "Flux, as its authors name it": (
        "double_blocks.#.{img,txt}_{attn.{qkv,proj},mlp.#,mod.lin}",
        "single_blocks.#.{linear1,linear2,modulation.lin}",
        "{img_in,txt_in,{time,vector,guidance}_in.{in,out}_layer,final_layer.{linear,adaLN_modulation.#}}",
    ),
    "Flux, as diffusers names it": (
        f"transformer_blocks.#.{{{_JOINT},{{ff,ff_context}}.net.{{#,#.proj}},{{norm1,norm1_context}}.linear}}",
        f"single_transformer_blocks.#.{{{_JOINT},proj_mlp,proj_out,norm.linear}}",
        "{x_embedder,context_embedder,norm_out.linear,proj_out}",
        "time_text_embed.{timestep,text,guidance}_embedder.linear_#",
    ),
    "CLIP text encoder": (
        f"text_model.encoder.layers.#.{_CLIP_LAYER}",
        "{text_projection,text_model.{final_layer_norm,embeddings.{token,position}_embedding}}",
    ),
    "T5": (
        "{encoder,decoder}.block.#.layer.#.{{Self,EncDec}Attention.{q,k,v,o},DenseReluDense.{wi,wi_#,wo},layer_norm}",
        "{shared,lm_head,{encoder,decoder}.final_layer_norm}",
    ),
    "Llama, Mistral, Qwen, Gemma, Phi": (f"model.layers.#.{_LAYER}", "{lm_head,model.embed_tokens,model.norm}"),
    "GPT-2, Bloom, Falcon, GPT-J": (
        "transformer.h.#.attn.{c_attn,c_proj,{q,k,v,out}_proj}",
        "transformer.h.#.mlp.{c_fc,c_proj,fc_in,fc_out,dense_h_to_4h,dense_4h_to_h}",
        "transformer.h.#.{self_attention.{query_key_value,dense},ln_#,input_layernorm,post_attention_layernorm}",
        "{transformer.{wte,wpe,ln_f,word_embeddings},score}",
    ),
    "GPT-NeoX": (
        "gpt_neox.layers.#.{attention.{query_key_value,dense},mlp.{dense_h_to_4h,dense_4h_to_h}}",
        "embed_out",
    ),
    "BERT, RoBERTa": (
        "{bert,roberta}.encoder.layer.#.{attention.{self.{query,key,value},output.dense},{intermediate,output}.dense}",
        "{classifier,{bert,roberta}.pooler.dense,classifier.{dense,out_proj}}",
    ),
}  # fmt: skip


def flat(path: str) -> str:
    """Return a dotted path as kohya spells it."""
    return path.replace(".", "_")


class Lookup:
    """From flattened paths to dotted ones. Paths with numbers match any number of layers if ``any_number``."""

    def __init__(self, paths: Iterable[str], *, any_number: bool) -> None:
        self._any = any_number
        self._known: dict[str, set[str]] = {}
        for path in paths:
            self._known.setdefault(self._key(flat(path))[0], set()).add(path)

    def __call__(self, flattened: str) -> str | None:
        """Return the dotted path, or None; :class:`NameUnresolvedError` where two are spelled alike."""
        key, numbers = self._key(flattened)
        found = self._known.get(key, set())
        if len(found) > 1:
            raise NameUnresolvedError("a flattened name means several parameters", parameter=flattened,
                                      got=", ".join(sorted(found)), hint="--rename REGEX=REPL says which")  # fmt: skip
        if not found:
            return None
        (template,) = found
        return _filled(template, numbers) if self._any else template

    def _key(self, flattened: str) -> tuple[str, list[str]]:
        if not self._any:
            return flattened, []
        parts = [("#", part) if part.isdecimal() else (part, "") for part in flattened.split("_")]
        return "_".join(word for word, _ in parts), [n for _, n in parts if n]


def _filled(template: str, numbers: list[str]) -> str:
    each = iter(numbers)
    return re.sub("#", lambda _: next(each), template)


@cache
def shipped() -> Lookup:
    """Return the lookup over all families; built when first asked for (a few thousand short strings)."""
    return Lookup({path for family in FAMILIES.values() for t in family for path in expanded(t)}, any_number=True)


def expanded(template: str) -> Iterator[str]:
    """Yield every string of a template: ``a.{b,c{1,2}}`` is ``a.b``, ``a.c1``, ``a.c2``."""
    start = template.find("{")
    if start < 0:
        yield template
        return
    choices, end = _choices(template, start)
    for choice in choices:
        yield from expanded(template[:start] + choice + template[end:])


def _choices(template: str, start: int) -> tuple[list[str], int]:
    """Return the comma-separated choices of the brace at ``start``, and where it ends."""
    depth, at, found = 0, start + 1, []
    for i in range(start, len(template)):
        depth += {"{": 1, "}": -1}.get(template[i], 0)
        if (depth == 1 and template[i] == ",") or depth == 0:
            found.append(template[at:i])
            at = i + 1
        if depth == 0:
            return found, i + 1
    raise ValueError(f"unbalanced template {template!r}")


def renamed(names: Iterable[str], rules: Iterable[str]) -> dict[str, str]:
    """Return old -> new name under ``REGEX=REPL`` rules, applied in order with :func:`re.sub`.

    Raises :class:`UsageError` for a rule that is none, and :class:`MismatchError` where two names become one.
    """
    compiled = [_rule(rule) for rule in rules]
    done: dict[str, str] = {}
    for name in names:
        done[name] = name
        for regex, replacement in compiled:
            done[name] = _substituted(regex, replacement, done[name])
    owner: dict[str, str] = {}
    for old, new in done.items():
        if owner.setdefault(new, old) != old:
            raise MismatchError("--rename gives two parameters one name", parameter=new, got=f"{owner[new]} and {old}")
    return done


def _rule(rule: str) -> tuple[re.Pattern[str], str]:
    pattern, equals, replacement = rule.partition("=")
    if not equals or not pattern:
        raise UsageError("--rename wants REGEX=REPL", got=rule)
    try:
        return re.compile(pattern), replacement
    except re.error as error:
        raise UsageError("--rename: not a regular expression", got=f"{pattern}: {error}") from None


def _substituted(regex: re.Pattern[str], replacement: str, name: str) -> str:
    try:
        return regex.sub(replacement, name)
    except (re.error, IndexError) as error:
        raise UsageError("--rename: not a replacement", got=f"{replacement}: {error}") from None
