"""Tests that the tasks hold the data that they claim to hold, and that their models compute what is needed."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.grokking.tasks import Task, language, load, modular, molecules, published, sentiment, tabular

TASKS = load()
HERE = [task for task in TASKS.values() if task.name != "imdb"]  # imdb's files must be unpacked first

OPERATIONS = {
    "mul97": lambda x, y: x * y % 97,
    "add97": lambda x, y: (x + y) % 97,
    "sub97": lambda x, y: (x - y) % 97,
    "div97": lambda x, y: x * pow(y, 95, 97) % 97,
    "quad97": lambda x, y: (x**2 + x * y + y**2) % 97,
    "add113": lambda x, y: (x + y) % 113,
}


@pytest.fixture(autouse=True)
def brief_pretraining(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrain for two steps only, and keep the weights in a folder that all tests share."""
    monkeypatch.setattr(language, "PRETRAINING", 2)
    monkeypatch.setattr(language, "CACHE", tmp_path_factory.getbasetemp() / "pretrained")


@pytest.mark.parametrize("task", HERE, ids=lambda task: task.name)
def test_a_start_depends_on_the_seed_alone(task: Task) -> None:
    (a, data, batches), (b, same, others), (_, different, _) = task.start(0), task.start(0), task.start(1)
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert torch.equal(data.report.inputs, same.report.inputs)
    assert not torch.equal(data.train.targets, different.train.targets)
    batch, other = next(batches), next(others)
    assert torch.equal(batch.inputs, other.inputs)
    loss = task.loss(a(batch.inputs), batch.targets)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in a.parameters())
    scores = task.score(a(data.signal.inputs), data.signal.targets)
    assert scores.shape == (len(data.signal),)
    assert scores.max() <= 1


@pytest.mark.parametrize("task", [task for task in HERE if task.name != "published"], ids=lambda task: task.name)
def test_what_is_held_out_is_cut_in_a_tenth_and_the_rest(task: Task) -> None:
    data = task.start(0).data
    assert len(data.signal) == (len(data.signal) + len(data.report)) // 10
    if not task.name.startswith(("parity", "ring16", "sentiment")):  # these may repeat an example
        rows = torch.cat([part.inputs.flatten(1) if part.inputs.dim() > 1 else part.inputs[:, None] for part in data])
        assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("name", OPERATIONS)
def test_arithmetic(name: str) -> None:
    data = TASKS[name].start(0).data
    for part in data:
        for (x, y), answer in zip(part.inputs[:200].tolist(), part.targets[:200].tolist(), strict=True):
            assert OPERATIONS[name](x, y) == answer


def test_composition_of_permutations() -> None:
    group = list(permutations(range(5)))
    some = TASKS["s5"].start(0).data.train[:200]
    for (x, y), answer in zip(some.inputs.tolist(), some.targets.tolist(), strict=True):
        assert group[answer] == tuple(group[x][i] for i in group[y])


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_transformer_is_one_over_four_tokens(blocks: int) -> None:
    """The model reuses what equal tokens have in common. It must agree with torch's attention over all four tokens."""
    torch.manual_seed(0)
    model = modular.Transformer(97, blocks)
    tokens = torch.randint(97, (7, 2))
    embedding, *layers, head = model.layers
    x, y = tokens.T
    four = torch.stack([x, torch.full_like(x, 97), y, torch.full_like(x, 98)], dim=1)
    rows = embedding.token(four) + embedding.position.weight
    for block in layers:
        normed = block.norm1(rows)
        heads = (h.view(7, 4, 4, 32).transpose(1, 2) for h in (block.q(normed), *block.kv(normed).chunk(2, dim=-1)))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        rows = rows + block.out(attended.transpose(1, 2).reshape(7, 4, 128))
        rows = rows + block.mlp(block.norm2(rows))
    torch.testing.assert_close(model(tokens), head.logits(head.norm(rows[:, -1])))


def test_the_published_model() -> None:
    torch.manual_seed(0)
    model = published.Decoder()
    assert sum(p.numel() for p in model.parameters()) == 422_784  # it has one position more than tokens
    tokens = torch.randint(0, 97, (3, 4))
    logits = model(tokens)
    assert logits.shape == (3, 99)
    changed = tokens.clone()
    changed[:, 0] += 1
    assert not torch.equal(model(changed), logits)  # the last position sees the first


def test_molecules_have_bonds_where_chemistry_has() -> None:
    """Each atom has a bond. Hydrogen and fluorine have at most one, oxygen two, carbon and charged nitrogen four."""
    atoms, bonds, polarizability = molecules.molecules()
    bonded = bonds.any(-1)
    assert torch.equal(bonded, bonded.transpose(1, 2))
    degree, real = bonded.sum(2), atoms[..., -1] == 1
    assert (degree[~real] == 0).all()
    assert (degree[real] >= 1).all()
    most = atoms[..., :5] @ torch.tensor([1.0, 4, 4, 2, 1])  # for H, C, N, O, F
    assert (degree <= most).all()
    assert abs(polarizability.mean()) < 1e-5
    # larger molecules are easier to polarize
    assert torch.corrcoef(torch.stack([real.sum(1).float(), polarizability]))[0, 1] > 0.5


def test_the_graph_network_adds_up_its_neighbours() -> None:
    torch.manual_seed(0)
    layer = molecules.NNConv(2, 3)
    x, bonds = torch.randn(4, 2), torch.rand(3, molecules.EDGE)
    ends = torch.tensor([[0, 0, 2], [1, 3, 0]])  # atom 0 receives from 1 and 3, atom 2 from 0
    matrices = layer.edge(bonds).view(3, 2, 3)
    expected = layer.root(x)
    expected[0] += x[1] @ matrices[0] + x[3] @ matrices[1]
    expected[2] += x[0] @ matrices[2]
    torch.testing.assert_close(layer(x, ends, bonds), expected)


def test_a_molecule_is_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    model = molecules.GraphNetwork()
    torch.testing.assert_close(model(torch.tensor([3, 400, 7]))[1:2], model(torch.tensor([400])))


def test_reviews_are_half_kind_and_padded_on_the_left() -> None:
    data = TASKS["sentiment"].start(0).data
    assert data.train.inputs.shape == (750, 16)
    assert 0.45 < data.train.targets.mean() < 0.55
    words = data.train.inputs
    assert words.max() <= sentiment.WORDS
    assert ((words[:, 1:] > 0) | (words[:, :-1] == 0)).all()  # no padding after a word
    assert (words[:, -1] > 0).float().mean() > 0.95


def test_imdb_is_read_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMDB", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set IMDB"):
        TASKS["imdb"].start(0)
    for side, word in (("pos", "splendid"), ("neg", "dreadful")):
        (tmp_path / "train" / side).mkdir(parents=True)
        for i in range(500):
            (tmp_path / "train" / side / f"{i}.txt").write_text(f"{word} film number{i}")
    data = TASKS["imdb"].start(0).data
    assert data.train.inputs.shape == (750, 500)
    assert len(data.signal) + len(data.report) == 250


def test_windows_of_text_do_not_overlap() -> None:
    text = language.hamlet()
    pieces = language.windows(text)
    assert len(pieces) == len(text) // 65
    joined = torch.cat([pieces.inputs, pieces.targets[:, -1:]], dim=1)
    assert bytes(joined.flatten().tolist()) == text[: 65 * len(pieces)]
    assert torch.equal(pieces.inputs[:, 1:], pieces.targets[:, :-1])


@pytest.mark.parametrize("name", ["hamlet", "hamlet-finetuning"])
def test_each_window_is_in_one_part(name: str) -> None:
    data = TASKS[name].start(0).data
    parts = [torch.cat([part.inputs, part.targets[:, -1:]], dim=1).tolist() for part in data]
    known = {tuple(piece) for part in parts for piece in part}
    assert len(known) == sum(map(len, parts))
    expected = language.windows(language.hamlet())[: len(known)]
    assert known == {
        (*inputs, last)
        for inputs, last in zip(map(tuple, expected.inputs.tolist()), expected.targets[:, -1].tolist(), strict=True)
    }


def test_the_language_model_sees_nothing_that_comes_later() -> None:
    torch.manual_seed(0)
    model = language.LanguageModel()
    text = torch.randint(256, (3, 64))
    changed = text.clone()
    changed[:, 40:] = (text[:, 40:] + 1) % 256
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            before, after = model(text), model(changed)
        torch.testing.assert_close(before[:, :40], after[:, :40])
        assert (before[:, 40:] - after[:, 40:]).abs().amin(dim=(0, 1)).max() > 0.01


def test_a_score_is_minus_the_loss_of_the_example() -> None:
    for name in ("hamlet", "breast-cancer", "diabetes"):
        task = TASKS[name]
        model, data, _ = task.start(0)
        outputs, targets = model(data.signal.inputs), data.signal.targets
        torch.testing.assert_close(task.score(outputs, targets).mean(), -task.loss(outputs, targets))
        one = task.loss(outputs[3:4], targets[3:4])
        torch.testing.assert_close(task.score(outputs, targets)[3], -one)


def test_pretraining_is_done_once_and_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "CACHE", tmp_path)
    first = language.finetuning(5).model.state_dict()
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "old")
    again = language.finetuning(5).model.state_dict()  # computed again
    assert path.exists()
    computed = language.pretrain
    monkeypatch.setattr(language, "pretrain", None)
    cached = language.finetuning(5).model.state_dict()
    assert first.keys() == again.keys() == cached.keys()
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, cached[name])
    monkeypatch.setattr(language, "pretrain", computed)
    language.pretrained(6)
    monkeypatch.setattr(language, "PRETRAINING", 3)  # other weights get another file
    language.pretrained(6)
    assert len(list(tmp_path.iterdir())) == 4


def test_pretraining_learns() -> None:
    torch.manual_seed(0)
    model = language.LanguageModel()
    reviews = language.windows(language.reviews())[:50]
    before = language.loss(model(reviews.inputs), reviews.targets)
    model.load_state_dict(language.pretrain(0, 15))
    assert language.loss(model(reviews.inputs), reviews.targets) < before - 1


def test_columns_are_scaled_by_the_training_part() -> None:
    data = TASKS["diabetes"].start(0).data
    for values in (data.train.inputs, data.train.targets):
        torch.testing.assert_close(values.mean(dim=0), torch.zeros_like(values[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(dim=0), torch.ones_like(values[0]))
    assert data.report.inputs.mean(dim=0).abs().max() > 1e-3
    never_changes = torch.tensor([[1.0], [3.0]])
    assert torch.equal(tabular.standard(never_changes, torch.ones(4, 1)), torch.tensor([[0.0], [2.0]]))


def test_a_package_that_is_not_there_is_named() -> None:
    from benchmarks.grokking.tasks import packaged

    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps nowhere"):
        packaged("nowhere", "data.csv")
