"""The report: what it adds up, and the reasons that it gives."""

from torch import nn

import fedpara_plugins as fedpara


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3)
        self.norm = nn.BatchNorm2d(64)
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64 * 16, 20)

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x))))


def reasons(model):
    return {row.name: row.note for row in fedpara.report(model).rows}


def test_report_adds_up_and_says_why():
    model = fedpara.convert(Net(), method="fedpara", gamma=0.1)
    report = fedpara.report(model)
    assert report.dense_parameters == sum(p.numel() for p in Net().parameters())
    assert report.parameters == sum(p.numel() for p in model.parameters())
    size = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert report.shared_bytes == size
    notes = reasons(model)
    assert "3 (fewer than 4)" in notes["stem"]
    assert "BatchNorm2d" in notes["norm"]
    assert str(report).count("\n") == len(report.rows) + 1


def test_report_of_pfedpara_counts_only_what_is_sent():
    model = fedpara.convert(Net(), method="pfedpara", gamma=0.5)
    shared = fedpara.split(model).shared
    sent = sum(v.numel() * v.element_size() for v in shared.values())
    assert fedpara.report(model).shared_bytes == sent


def test_bytes_of_what_is_tied_are_those_of_a_state():
    """A parameter of the model once, a tensor of its state, and so of a message, twice."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    dense = sum(value.numel() * 4 for value in model.state_dict().values())
    found = fedpara.report(fedpara.convert(model, method="fedpara"))
    assert found.dense_bytes == dense
    assert found.shared_bytes == sum(v.numel() * 4 for v in model.state_dict().values())
    assert found.parameters == sum(p.numel() for p in model.parameters())
