import subprocess
import sys

import pytest
import torch

import fedpara_plugins as fedpara
from fedpara_plugins.testing.layer_contract import LayerContract

pytorch_utils = pytest.importorskip(
    "transformers.pytorch_utils", reason="needs transformers: `tox run -e core-models`"
)


class TestTransformersConv1D(LayerContract):
    dense_class = pytorch_utils.Conv1D

    def cases(self):
        tokens = torch.randn(2, 3, 96)
        return [
            (pytorch_utils.Conv1D(160, 96), tokens),
            (pytorch_utils.Conv1D(64, 96), tokens),
        ]


def test_text_and_shapes():
    layer = fedpara.convert(pytorch_utils.Conv1D(nf=160, nx=96), rank=11)
    assert repr(layer) == "FactorisedConv1D(nf=160, nx=96, fedpara rank 11)"
    assert layer.x1.shape == (96, 11)
    assert layer.y1.shape == (160, 11)


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_converted_layer_is_unpickled_where_nobody_imported_transformers(tmp_path):
    layer = fedpara.convert(pytorch_utils.Conv1D(160, 96))
    torch.save(layer, tmp_path / "layer.pt")
    run(
        f"import torch; layer = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False);"
        "assert layer(torch.zeros(1, 96)).shape == (1, 160)"
    )


def test_the_kind_appears_when_transformers_is_imported_after_the_first_look():
    run(
        "import sys; from fedpara_plugins import plugins; before = len(plugins.layers());"
        "assert 'transformers' not in sys.modules;"
        "from transformers.pytorch_utils import Conv1D;"
        "assert Conv1D in plugins.layers() and len(plugins.layers()) == before + 1"
    )
