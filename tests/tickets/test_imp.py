import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import nn

from jacpot import tickets
from jacpot.tickets import Mask, Tickets, _files

# Python 3.12 warns of forking a process with threads; the children here use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def train(net, start=0, stop=None):
    """30 steps on batches drawn from the global random state, as careless user code would."""
    optimizer = torch.optim.Adam(net.parameters(), 0.02, weight_decay=0.01)
    weights = torch.linspace(-1, 1, 18).view(6, 3)
    for _ in range(start, 30 if stop is None else stop):
        x = torch.randn(20, 6)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), (x @ weights).argmax(1))
        loss.backward()
        optimizer.step()
    return {"loss": loss.item(), "note": "text"}


def assert_same_search(a, b):
    for one, other in zip(a.rounds, b.rounds, strict=True):
        assert one.mask == other.mask
        assert one.metrics == other.metrics
        assert all(torch.equal(one.state[k], other.state[k]) for k in one.state)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("rewind", ["init", 5, "learning-rate"])
def test_masks_are_nested_and_exact(rewind, scope):
    found = tickets.imp(make_net(), train, rounds=4, rewind=rewind, scope=scope)
    kept = found.masks[0].nnz
    for before, after in zip(found.masks, found.masks[1:], strict=False):
        assert after & before == after
        if scope == "global":
            kept = round(0.8 * kept)
            assert after.nnz == kept
        else:
            assert all(int(m.sum()) == round(0.8 * int(before[n].sum())) for n, m in after.items())
    for done in found.rounds:
        assert all((done.state[n][~m] == 0).all() for n, m in done.mask.items())


@pytest.mark.parametrize("rewind", ["init", 7])
def test_every_round_starts_at_the_rewound_weights_bitwise(rewind):
    starts = []

    def watched(net, start=0, stop=None):
        if stop is None:
            masks = tickets.applied_mask(net)
            plain = {n: net.get_submodule(n[0]).weight.detach().clone() for n in masks}
            starts.append(
                (masks, plain, [b.clone() for b in net.buffers() if b.dtype != torch.bool])
            )
        return train(net, start, stop)

    net = make_net()
    found = tickets.imp(net, watched, rounds=3, rewind=rewind)
    reference = make_net()
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), reference.state_dict().values(), strict=True)
    )
    moved = found.start.state_dict()
    assert (rewind == "init") == torch.equal(moved["0.weight"], net[0].weight)
    mask, weights, buffers = starts[3]
    for name, weight in weights.items():
        assert torch.equal(weight, torch.where(mask[name], moved[name], 0))
    assert all(torch.equal(a, b) for a, b in zip(buffers, found.start.buffers(), strict=True))
    ticket = found.ticket(3)
    assert torch.equal(ticket[0].weight, weights["0.weight"])


def test_learning_rate_rewinding_goes_on_from_trained_weights():
    seen = []

    def watched(net):
        seen.append(net[0].weight.detach().clone())
        return train(net)

    found = tickets.imp(make_net(), watched, rounds=1, rewind="learning-rate")
    assert torch.equal(seen[1], found.rounds[0].state["0.weight"] * found.mask["0.weight"])


def test_output_layer_at_half_rate():
    found = tickets.imp(
        make_net(), train, rounds=2, scope="layer", layer_fractions={"3.weight": 0.1}
    )
    assert found.mask.densities["0.weight"] == pytest.approx(0.64, abs=0.01)
    assert found.mask.densities["3.weight"] == pytest.approx(0.81, abs=0.02)


def test_random_state_is_left_alone():
    net = make_net()
    before = torch.get_rng_state()
    tickets.imp(net, train, rounds=1, rewind=2)
    assert torch.equal(before, torch.get_rng_state())


def test_interrupted_between_any_two_calls_and_resumed(tmp_path):
    whole = tickets.imp(make_net(), train, rounds=3, rewind=4, directory=tmp_path / "whole")
    for allowed in range(5):
        calls = 0

        def fragile(net, start=0, stop=None, allowed=allowed):
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise KeyboardInterrupt
            return train(net, start, stop)

        folder = tmp_path / str(allowed)
        with pytest.raises(KeyboardInterrupt):
            tickets.imp(make_net(), fragile, rounds=3, rewind=4, directory=folder)
        torch.manual_seed(12345 + allowed)  # another process has another random state
        resumed = tickets.imp(make_net(), train, rounds=3, rewind=4, directory=folder)
        assert_same_search(whole, resumed)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_what_ends_a_search_carries_the_finished_rounds(kind):
    whole = tickets.imp(make_net(), train, rounds=2)
    calls = 0

    def fragile(net):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise kind("no more")
        return train(net)

    with pytest.raises(kind, match="no more") as caught:
        tickets.imp(make_net(), fragile, rounds=5)
    found = caught.value.found
    assert_same_search(Tickets(whole.start, whole.rounds[:2]), found)
    x = torch.randn(3, 6)
    assert torch.equal(found.trained().eval()(x), whole.trained(1).eval()(x))


def test_a_finished_search_is_read_not_run(tmp_path):
    first = tickets.imp(make_net(), train, rounds=2, directory=tmp_path)

    def refuse(net):
        raise AssertionError("must not train")

    again = tickets.imp(make_net(), refuse, rounds=2, directory=tmp_path)
    assert_same_search(first, again)
    longer = tickets.imp(make_net(), train, rounds=3, directory=tmp_path)
    assert_same_search(tickets.imp(make_net(), train, rounds=3), longer)


def _search_forever(folder):
    tickets.imp(make_net(), train, rounds=20, prune_fraction=0.05, directory=folder)


def test_kill_9_loses_nothing(tmp_path):
    whole = tickets.imp(make_net(), train, rounds=20, prune_fraction=0.05)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        process = context.Process(target=_search_forever, args=(tmp_path,))
        before = len(list(tmp_path.glob("round-*")))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if len(list(tmp_path.glob("round-*"))) >= before + 2:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        process.join()
    resumed = tickets.imp(make_net(), train, rounds=20, prune_fraction=0.05, directory=tmp_path)
    assert_same_search(whole, resumed)


def _die_in_a_write(folder, point, count):
    genuine = getattr(os, point)
    calls = 0

    def kill_at(*arguments):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(*arguments)

    setattr(_files.os, point, kill_at)
    tickets.imp(make_net(), train, rounds=3, rewind=4, directory=folder)


@pytest.mark.parametrize("point", ["fsync", "replace"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_kill_9_during_a_checkpoint_write_loses_nothing(tmp_path, point, count):
    whole = tickets.imp(make_net(), train, rounds=3, rewind=4)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_die_in_a_write, args=(tmp_path, point, count))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    resumed = tickets.imp(make_net(), train, rounds=3, rewind=4, directory=tmp_path)
    assert_same_search(whole, resumed)
    assert all(path.read_bytes() == content for path, content in kept.items())  # used, not redone


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_write_that_dies_half_way_leaves_the_old_file(tmp_path, monkeypatch, point):
    path = tmp_path / "file"
    _files.write_atomically(path, b"old")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_files.os, point, die)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    tickets.imp(make_net(), train, rounds=0, directory=tmp_path)
    with pytest.raises(ValueError, match="another prune_fraction, seed"):
        tickets.imp(make_net(), train, rounds=0, directory=tmp_path, prune_fraction=0.3, seed=1)
    other = make_net()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="another weights"):
        tickets.imp(other, train, rounds=0, directory=tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["prune_fraction"] == 0.2


def test_table_and_plot(tmp_path):
    import io

    from rich.console import Console

    found = tickets.imp(make_net(), train, rounds=1)
    console = Console(file=io.StringIO(), width=80)
    console.print(found.table("search"))
    assert "0.7986" in console.file.getvalue()
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_refusals():
    with pytest.raises(ValueError, match=r"'rounds' must be at least 0, got -1"):
        tickets.imp(make_net(), train, rounds=-1)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got 1"):
        tickets.imp(make_net(), train, prune_fraction=1)
    with pytest.raises(ValueError, match="'rewind' must be"):
        tickets.imp(make_net(), train, rewind="final")
    with pytest.raises(ValueError, match="needs scope='layer'"):
        tickets.imp(make_net(), train, layer_fractions={"0.weight": 0.1})
    with pytest.raises(ValueError, match="'9' is not among"):
        tickets.imp(make_net(), train, scope="layer", layer_fractions={"9": 0.1})


def test_a_mask_to_begin_with():
    net = make_net()
    first = Mask.ones(net, include="0.weight")
    found = tickets.imp(net, train, rounds=1, mask=first)
    assert list(found.mask) == ["0.weight"]


def other_score(module, mask):
    return {name: -score for name, score in tickets.score.magnitude(module, mask).items()}


def test_another_score_is_another_search(tmp_path):
    net = torch.nn.Linear(4, 2)
    tickets.imp(net, lambda net: None, 1, directory=tmp_path)
    with pytest.raises(ValueError, match="holds a search with another score"):
        tickets.imp(net, lambda net: None, 1, directory=tmp_path, score=other_score)


def test_layers_may_empty_if_allowed():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with torch.no_grad():
        net[0].weight.mul_(1e-6)
    with pytest.raises(ValueError, match="allow_empty=True") as caught:
        tickets.imp(net, lambda net: None, 2, 0.5)
    assert len(caught.value.found.rounds) == 1
    found = tickets.imp(net, lambda net: None, 2, 0.5, allow_empty=True)
    assert [done.mask.nnz for done in found.rounds] == [32, 16, 8]


def test_arguments_of_another_type_are_refused():
    net = torch.nn.Linear(4, 2)
    with pytest.raises(TypeError, match="'prune_fraction' must be a number, got 'a'"):
        tickets.imp(net, lambda net: None, prune_fraction="a")
    with pytest.raises(TypeError, match="'rewind' must be a name or a step, got True"):
        tickets.imp(net, lambda net: None, rewind=True)
    with pytest.raises(TypeError, match="'rounds' must be an int, got str"):
        tickets.imp(net, lambda net: None, rounds="1")
    with pytest.raises(TypeError, match="'train' must be callable, got NoneType"):
        tickets.imp(net, None)
    with pytest.raises(TypeError, match="'train' must return a mapping of metrics or None, got li"):
        tickets.imp(net, lambda net: [1.0])


def test_a_negative_seed_is_one_of_its_own():
    numbers = []
    for seed in (-1, 1):
        tickets.imp(
            torch.nn.Linear(4, 2), lambda net: numbers.append(torch.rand(()).item()), 0, seed=seed
        )
    assert numbers[0] != numbers[1]


def test_damaged_files_and_odd_metrics_are_said_to_be_such(tmp_path):
    net = torch.nn.Linear(4, 2)
    with pytest.raises(TypeError, match="'train' must return metrics plain enough"):
        tickets.imp(net, lambda net: {"loss": torch.ones(())}, 0, directory=tmp_path)
    tickets.imp(net, lambda net: {"loss": 1.0}, 0, directory=tmp_path)
    (tmp_path / "round-000.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"round-000\.safetensors is damaged"):
        tickets.imp(net, lambda net: {"loss": 1.0}, 0, directory=tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        tickets.imp(net, lambda net: {"loss": 1.0}, 0, directory=tmp_path)
