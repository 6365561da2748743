"""The text of a codec: what it means, that its name reads back, and what errors say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpara_plugins.codecs import BUILTIN_STAGES, PRESETS, Codec, parse_codec
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.stages.quantise import QuantiseStage

STAGES = {stage.name: stage for stage in BUILTIN_STAGES}

decimals = st.floats(0.001, 16, allow_nan=False)
steps = st.one_of(
    st.integers(2, 16).map("bits={}".format), decimals.map("rms={!r}".format), st.just("")
)
scopes = st.sampled_from(["", "scope=tensor", "scope=row", "scope=block", "scope=block,block=64"])
roundings = st.sampled_from(["", "rounding=nearest", "rounding=stochastic"])
quantise = st.tuples(steps, scopes, roundings).map(
    lambda parts: ":".join(["quantise", ",".join(filter(None, parts))]).rstrip(":")
)
shortened = st.one_of(quantise, st.sampled_from(["cast", "cast:to=fp16", "int8"]))
selected = st.one_of(
    st.just(""),
    st.just("topk"),
    st.integers(1, 10**6).map("topk:count={}".format),
    st.floats(1e-6, 1, allow_nan=False).map("topk:share={!r}".format),
)
chains = st.tuples(
    st.sampled_from(["", "delta"]),
    st.sampled_from(["", "feedback"]),
    selected,
    shortened,
    st.sampled_from(["", "zlib", "entropy", "entropy:prefer=zstd", "entropy:prefer=ans"]),
).map(lambda parts: "+".join(filter(None, parts)))


@given(text=chains)
def test_the_name_of_a_codec_reads_back_to_that_codec(text):
    codec = parse_codec(text, STAGES)
    again = parse_codec(codec.name, STAGES)
    assert again == codec
    assert again.name == codec.name
    assert codec.feedback == ("feedback" in text)
    assert (codec.entropy is not None) == ("entropy" in text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lossless", "planes+entropy:prefer=zstd"),
        ("balanced", "delta+quantise:rms=0.05+entropy:prefer=zstd"),
        ("small", "delta+feedback+quantise:rms=2+entropy:prefer=ans"),
        ("tiny", "delta+feedback+quantise:rms=4+entropy:prefer=ans"),
        (" delta + quantise : bits = 4 , scope = row ", "delta+quantise:bits=4,scope=row"),
        ("quantise", "quantise:bits=8"),
        ("quantise:rms=2.50,scope=tensor,rounding=nearest", "quantise:rms=2.5"),
        ("quantise:scope=block,block=256", "quantise:bits=8,scope=block"),
        ("quantise:block=32,scope=block", "quantise:bits=8,scope=block,block=32"),
        ("cast", "cast:to=bf16"),
        ("topk:share=1e-2", "topk:share=0.01"),
        ("entropy", "entropy:prefer=ans"),
    ],
)  # fmt: skip
def test_text_has_one_canonical_name_with_its_options(text, name):
    assert parse_codec(text, STAGES).name == name


def test_options_reach_the_stage():
    stage = parse_codec("quantise:rms=2,scope=row,rounding=stochastic", STAGES).stages[0]
    assert isinstance(stage, QuantiseStage)
    assert (stage.bits, stage.rms, stage.scope, stage.rounding) == (None, 2.0, "row", "stochastic")


def test_headers_name_plain_stages():
    codec = parse_codec("delta+feedback+topk:count=3+quantise:bits=4+zlib", STAGES)
    assert codec.stage_names == "delta+topk+quantise+zlib"
    assert Codec(()).stage_names == "none"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quantize:bits=4", "unknown stage 'quantize'.*mean 'quantise'.*feedback and entropy"),
        ("balancd", "did you mean 'balanced'"),
        ("entropi", "did you mean 'entropy'"),
        ("delta+small", "'small' is a preset, which stands alone"),
        ("small:rms=3", "'small' is a preset, which stands alone and has no options"),
        ("zlib:level=9", "'zlib' has no options, got level"),
        ("quantise:bit=4", "no option 'bit'; .* 'bits'.*bits, rms, scope, block, rounding"),
        ("quantise:bits=1", "option 'bits'.*integer from 2 to 16, got '1'"),
        ("quantise:bits=17", "integer from 2 to 16, got '17'"),
        ("quantise:bits=4.0", "integer from 2 to 16, got '4.0'"),
        ("quantise:bits=²", "integer from 2 to 16, got '²'"),
        ("quantise:rms=0", "option 'rms'.*number from 0.001 to 16, got '0'"),
        ("quantise:rms=nan", "number from 0.001 to 16, got 'nan'"),
        ("quantise:rms=two", "number from 0.001 to 16, got 'two'"),
        ("quantise:bits=4,rms=2", "'bits' and 'rms' of 'quantise' exclude each other"),
        ("quantise:block=64", "'block' of 'quantise' needs scope=block"),
        ("quantise:scope=block,block=3", "integer from 16 to 1048576, got '3'"),
        ("quantise:scope=rows", "expected tensor or row or block, got 'rows'; did you mean 'row'"),
        ("quantise:rounding=random", "expected nearest or stochastic, got 'random'"),
        ("quantise:bits", "expected key=value after 'quantise' and ':', got 'bits'"),
        ("quantise:", "expected key=value after 'quantise' and ':', got ''"),
        ("quantise:bits=", "expected key=value"),
        ("quantise:bits=4,bits=4", "option 'bits' twice"),
        ("cast:to=fp32", "option 'to' of 'cast': expected fp16 or bf16, got 'fp32'"),
        ("topk:share=0", "number from 1e-06 to 1, got '0'"),
        ("topk:count=0", "integer from 1 to 2147483647, got '0'"),
        ("topk:share=0.1,count=3", "'share' and 'count' of 'topk' exclude each other"),
        ("feedback:keep=1+quantise", "'feedback' has no options, got keep"),
        ("entropy:prefer=zlib", "option 'prefer' of 'entropy': expected ans or zstd, got 'zlib'"),
        ("entropy:like=ans", "'entropy' has no option 'like'.*prefer"),
        ("entropy+entropy", "'entropy' occurs twice"),
        ("feedback+feedback+int8", "'feedback' occurs twice"),
        ("entropy+int8", "'entropy' must be the last item, but 'int8' follows"),
        ("zlib+entropy", "'zlib' makes one opaque stream and must be the last.*'entropy' follows"),
        ("feedback+delta+int8", "'feedback' must come after 'delta'"),
        ("delta+int8+feedback", "'feedback' must come before 'int8'"),
        ("delta+feedback+zlib", "'feedback' keeps what lossy stages lose, and there is none"),
        ("quantise+int8", "'quantise' and 'int8' both write values with fewer bits"),
        ("cast+quantise", "'cast' and 'quantise' both write values with fewer bits"),
        ("quantise+topk", "'topk' compares exact values and must come before 'quantise'"),
        ("planes+quantise", "'planes' turns values into bytes.*coder, but 'quantise' follows"),
        ("delta+planes+topk", "'planes' turns values into bytes.*but 'topk' follows"),
        ("delta+grid", "'grid' needs the plain tensors.*before 'delta'; keep one of them"),
        ("topk+delta", "'delta' needs the plain tensors and must come before 'topk'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_what_would(text, said):
    with pytest.raises(ConfigError, match=said) as refused:
        parse_codec(text, STAGES)
    assert "codec" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "decoders", "coder"),
    [
        ("small", None, "zlib"),
        ("small", (), "zlib"),
        ("small", ("zlib",), "zlib"),
        ("small", ("zlib", "zstd"), "zstd"),
        ("small", ("zlib", "zstd", "ans"), "ans"),
        ("balanced", ("zlib", "zstd", "ans"), "zstd"),
        ("balanced", ("ans", "zlib"), "ans"),
        ("balanced", ("of another plugin",), "zlib"),
        ("lossless", None, "zlib"),
        ("lossless", ("zlib", "zstd", "ans"), "zstd"),
        ("lossless", ("zlib", "ans"), "ans"),
    ],
)
def test_the_entropy_coder_is_the_best_that_both_sides_have(text, decoders, coder, monkeypatch):
    monkeypatch.setattr("fedpara_plugins.codecs.chain.decoders", lambda: ("zlib", "zstd", "ans"))
    codec = parse_codec(text, STAGES)
    resolved = codec.resolved(decoders)
    assert resolved.stage_names.split("+")[-1] == coder
    assert resolved.entropy is None
    assert (resolved.feedback, resolved.stages[:-1]) == (codec.feedback, codec.stages)
    assert resolved.resolved(decoders) == resolved


def test_a_coder_that_this_side_lacks_is_not_taken(monkeypatch):
    monkeypatch.setattr("fedpara_plugins.codecs.chain.decoders", lambda: ("zlib",))
    codec = parse_codec("small", STAGES).resolved(("zlib", "zstd", "ans"))
    assert codec.stage_names == "delta+quantise+zlib"


def test_a_codec_whose_coder_is_not_chosen_does_not_code():
    with pytest.raises(ConfigError, match="not chosen yet; call resolved"):
        parse_codec("small", STAGES).encode({}, reference=None)


@pytest.mark.parametrize("preset", PRESETS)
def test_first_contact_is_lossless_and_without_feedback(preset):
    codec = parse_codec(preset, STAGES).first_contact()
    assert codec.lossless
    assert not codec.feedback
    assert not codec.needs_reference
    kept = {"none": "none", "lossless": "planes+zlib"}.get(preset, "zlib")
    assert codec.resolved(None).stage_names == kept
