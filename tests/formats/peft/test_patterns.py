from __future__ import annotations

import pytest

from loratools.errors import FormatError
from loratools.formats.peft.patterns import key_for, resolver, unused


def test_the_first_match_wins_on_whole_segments() -> None:
    of = resolver({"q_proj": 2, r".*\.0\..*": 3, "^top": 4}, 9, "rank_pattern")
    assert [of(p) for p in ("a.0.q_proj", "a.0.k_proj", "a.1.k_proj", "top", "a.top", "xq_proj")] == [2, 3, 9, 4, 9, 9]


ENDLESS = [
    "(a+)+", "(a|a)*", "(.*)*x", "((a)?b*)+", "(a|ab){2,}", ".*a.*b.*c.*d.*e", "x" * 2000, "a?" * 40 + "b",
    "a{1,99}" * 9 + "!", "(?:a{1,3}){2,30}!", "(a??)" * 40 + "b", "(?=(a|aa)+)b", r"(?:\w+\.)+x", ".*?" * 6,
    "a*" * 6 + "!",
]  # fmt: skip


@pytest.mark.parametrize("key", ENDLESS)
def test_patterns_that_could_run_for_ever_are_refused(key: str) -> None:
    with pytest.raises(FormatError, match="backtrack"):
        resolver({key: 1}, 0, "rank_pattern")


@pytest.mark.parametrize(
    ("key", "path"), [(".*.*.*.*!", "a." * 100), (".*.*.*!", "a." * 120), (r".*\.\d+\..*q", "a." * 500)]
)
def test_patterns_that_take_too_long_on_a_long_path_are_refused(key: str, path: str) -> None:
    of = resolver({key: 1}, 0, "alpha_pattern")
    assert of("a.b") == 0
    with pytest.raises(FormatError, match="key of alpha_pattern could backtrack"):
        of(path)


@pytest.mark.parametrize("key", ["(" * 490 + ")" * 490, "a{99999999999999}", "a)", "*a"])
def test_patterns_that_the_parser_gives_up_on_are_refused(key: str) -> None:
    with pytest.raises(FormatError, match="no regular expression"):
        resolver({key: 1}, 0, "rank_pattern")


@pytest.mark.parametrize(
    "key",
    [
        r".*layers\.("
        + "|".join(map(str, range(48)))
        + r")\.(self_attn|mlp)\..*(q_proj|k_proj|v_proj|up_proj|down_proj)",
        r"(model|base)\.(text_)?(decoder|encoder)?\.?layers\.\d{1,2}\.[a-z_]+\.(q|k|v|o)_proj",
        r".*\.block_sparse_moe\.experts\.\d+\.w[13]",
    ],
)
def test_long_patterns_of_alternatives_are_accepted(key: str) -> None:
    resolver({key: 1}, 0, "rank_pattern")("model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj")


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        r"model\.layers\.(0|1|2)\..*proj",
        r".*\.experts\.\d+\.w1",
        r"layers\.(1[0-9]|2[0-4])\.(q|k)_proj",
        "a.b-c",
        r"[a-z]+\.(?:x|y)?",
    ],
)
def test_patterns_of_real_configs_are_accepted(key: str) -> None:
    resolver({key: 1}, 0, "rank_pattern")("model.layers.0.q_proj")


def test_a_pattern_that_does_not_compile_is_named() -> None:
    with pytest.raises(FormatError, match="no regular expression") as caught:
        resolver({"a[": 1}, 0, "alpha_pattern")
    assert "alpha_pattern" in caught.value.what


def test_written_keys_match_their_module_alone() -> None:
    paths = ["proj_out", "blocks.0.proj_out", "blocks.1.proj_out", "layers.1.q", "layers.11.q"]
    for path in paths:
        of = resolver({key_for(path, paths): 1}, 0, "rank_pattern")
        assert [p for p in paths if of(p)] == [path]


@pytest.mark.parametrize(
    ("paths", "key"),
    [
        (["a.b", "q"], "a.b"),
        (["a.b", "a_b", "aXb"], r"a\.b"),
        (["a.b", "x.aXb"], r"a\.b"),
        (["a.b", "x.a.b"], "^a.b"),
        (["a.b", "x.a.b", "aXb"], r"^a\.b"),
        (["a.b", "xa.b", "a.c", "ab"], "a.b"),
        (["a.b+c-d", "q"], r"a.b\+c-d"),
    ],
)
def test_written_keys_escape_dots_only_where_another_path_would_match(paths: list[str], key: str) -> None:
    assert key_for(paths[0], paths) == key
    of = resolver({key: 1}, 0, "rank_pattern")
    assert [p for p in paths if of(p)] == [paths[0]]


def test_idle_patterns_are_found() -> None:
    assert unused({"q": 1, "k": 2}, ["a.q"], "rank_pattern") == ["k"]
