"""Tests that tox runs after the stage is uninstalled: what its users see then."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpara_plugins import ConfigError, MismatchError
from fedpara_plugins.codecs import decode_payload, parse_codec, peek_header

GOLDEN = Path(__file__).with_name("golden.safetensors")


def test_a_payload_of_the_missing_stage_is_refused_by_its_name():
    data = GOLDEN.read_bytes()
    assert peek_header(data).codec == "sz3"
    with pytest.raises(
        MismatchError, match=r"codec 'sz3'.*this side has the stages.*zlib.*missing"
    ):
        decode_payload(data, limit=10**6)


def test_a_codec_with_the_missing_stage_is_refused_by_its_name():
    with pytest.raises(ConfigError, match="unknown stage 'sz3' in 'delta"):
        parse_codec("delta+sz3:error=1e-3")
