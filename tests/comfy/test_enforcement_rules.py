"""Parts of enforced mode that need no host: what is denied, what a seal survives, how a hook is placed and missed."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import pickle
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PACK = "apl_enforcement_pack_under_test"


@pytest.fixture(scope="module")
def pack() -> Any:
    """The repository loaded as a host loads it: one package under a name of the host's choosing."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    yield lambda name: importlib.import_module(f"{PACK}.{name}")
    for name in [name for name in sys.modules if name == PACK or name.startswith(f"{PACK}.")]:
        del sys.modules[name]


def guard(pack: Any, **changes: Any) -> Any:
    core = pack("apl_core.prefix"), pack("apl_core.metadata"), pack("apl_core.policy")
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    prefix = core[0].AnonymizationPrompt("sd1", {"emb_params": vectors}, core[1].PrefixMetadata(title="t"))
    pin = core[2].Pin("sd1", Path("ap.safetensors"), "0" * 64)
    policy = core[2].Policy("enforced", {"sd1": pin}, **changes)
    return pack("comfy_nodes.enforcement.guard").Guard(policy, {"sd1": prefix})


def test_what_is_denied_depends_on_the_policy(pack: Any) -> None:
    graph = pack("comfy_nodes.enforcement.graph")
    auto, always = guard(pack, deny=("Load?mage", "*Face*")), guard(pack, negative="always", lock_training=False)
    for name in ("LoadImage", "InstantFaceID", "TrainLoraNode", "APL_TrainAnonymizationPrompt", "LatentSubtract",
                 "LoadLatent"):
        assert graph.is_denied(auto, name), name
        assert not graph.is_denied(always, name), name
    for name in ("KSampler", "APL_Anonymize", "LoadImageMask", "LatentUpscale"):
        assert not graph.is_denied(auto, name), name


def test_denied_nodes_and_outside_services_leave_the_hosts_table(pack: Any) -> None:
    graph = pack("comfy_nodes.enforcement.graph")
    outside = type("Outside", (), {"RELATIVE_PYTHON_MODULE": "comfy_api_nodes.nodes_x"})
    table = {"KSampler": object, "LatentSubtract": object, "AnyService": outside, "TrainLoraNode": object}
    assert graph.remove_denied(guard(pack), table) == ["AnyService", "LatentSubtract", "TrainLoraNode"]
    assert list(table) == ["KSampler"]


def test_graphs_are_looked_at_before_the_host_does(pack: Any) -> None:
    graph, checked, passed = pack("comfy_nodes.enforcement.graph"), [], []

    async def host(prompt_id: str, prompt: dict, partial: Any) -> tuple:
        passed.append(prompt)
        return True, None, [], {}

    watched = guard(pack, deny=("LoadImage",))
    watched.check = lambda: checked.append(1)
    validate = graph.hooked_validate(watched)(host)
    good = {"1": {"class_type": "KSampler", "inputs": {}}, "2": {"inputs": {}}}
    assert asyncio.run(validate("id", good, None))[0] and passed == [good]
    for bad, kind in (([], "invalid_prompt"), ("x", "invalid_prompt"), ({"1": None}, "invalid_prompt"),
                      ({"1": {"class_type": 5}}, "invalid_prompt"),
                      ({"1": {"class_type": "KSampler"}, "7": {"class_type": "LoadImage"}}, "apl_denied")):
        valid, error, outputs, nodes = asyncio.run(validate("id", bad, None))
        assert not valid and error["type"] == kind and outputs == [] and json.dumps(error), bad
        assert (kind == "apl_denied") == ("7" in nodes)
    assert len(passed) == 1 and len(checked) == 6


def test_a_seal_is_copied_with_its_dictionary_and_never_survives_writing(pack: Any) -> None:
    seal = pack("comfy_nodes.enforcement.seal")
    mark = seal.Seal()
    for copied in (copy.copy(mark), copy.deepcopy(mark), copy.deepcopy({"k": mark})["k"]):
        assert type(copied) is seal.Seal
    for written in (pickle.loads(pickle.dumps(mark)), json.loads(json.dumps(mark)), str(mark), mark + ""):
        assert type(written) is str, type(written)


def test_sealing(pack: Any) -> None:
    seal, errors = pack("comfy_nodes.enforcement.seal"), pack("apl_core.errors")
    watched = guard(pack)
    sealer = seal.Sealer(watched)
    cond = torch.zeros(1, 77, 8)
    clip = types.SimpleNamespace(cond_stage_model=object(), tokenizer=types.SimpleNamespace())
    sealer.hooked_encode(lambda clip, tokens: (cond, cond))(clip, {})
    check = sealer.hooked_convert(lambda value: value)
    own = [[cond, {}]]
    assert check(own) is own and type(own[0][1][seal.KEY]) is seal.Seal
    scheduled = sealer.hooked_scheduled(lambda clip, tokens, unprojected: [[cond.clone(), {"pooled_output": None}]])
    assert check(scheduled(clip, {}))
    for foreign in ([[cond.clone(), {}]], [[cond.clone(), {seal.KEY: "encoded by this server"}]], [[None, {}]]):
        with pytest.raises(errors.PolicyError, match="did not encode"):
            check(foreign)
    assert watched.counters["unsealed_refused"] == 3
    # Anything that is no conditioning passes a node's results unharmed.
    merge = sealer.hooked_merge(lambda results, obj: results)
    others = [[torch.ones(2)], [[1, 2]], [["text", {}]], [None], [[]], [{"samples": cond}], [(cond, {"a": 1}, 3)]]
    assert merge(others, object()) is others
    with pytest.raises(errors.PolicyError, match="object gave a conditioning"):
        merge([[[[cond.clone(), {}]]]], object())
    seal.Sealer(guard(pack, strict=False)).hooked_convert(lambda value: value)([[cond.clone(), {}]])


def test_weighted_sums_are_told_from_foreign_rows(pack: Any) -> None:
    """By numpy's least squares beside it: what a sum of this node's rows explains, and what it does not."""
    import numpy as np

    derived, guards = pack("comfy_nodes.enforcement.derived"), pack("comfy_nodes.enforcement.guard")
    watched, width = guard(pack), 64
    workings, g = derived.Workings(watched), torch.Generator().manual_seed(2)
    model = torch.nn.Identity()
    setattr(model, guards.TAG, guards.Encoder("sd1", "clip_l", width))
    rows = torch.randn(5, 77, width, generator=g)
    pooled = torch.randn(5, width, generator=g)
    weights = torch.randn(3, 5, 77, 1, generator=g)
    sums = (weights * rows).sum(1)  # three chunks of sums, every position with weights of its own
    cond = sums.reshape(1, 3 * 77, width)
    words = {"pooled_output": pooled[:1] * 2 - pooled[1:2], "width": 512, "x": "y"}
    assert not workings.explain(cond, words)  # nothing was encoded yet
    workings.record(model, (rows[:3], None, pooled[:3]), frozenset())
    workings.record(model, (torch.zeros(2, 77, width), rows[3:], pooled[3:]), frozenset())  # an earlier layer was asked
    assert workings.explain(cond, words)
    assert workings.explain(cond.half(), {"pooled_output": None})
    nothing = 0.3 * rows[:1] - 0.1 * rows[:1] - 0.2 * rows[:1]  # what is left is rounding alone
    assert 0 < float(nothing.abs().max()) < 1e-6 and workings.explain(nothing, words)
    projection = torch.nn.Linear(width, width, bias=False)
    watched.projections[model] = weakref.ref(projection)
    for weight, explains in ((1.0, True), (float("nan"), False)):  # memory that nobody filled is no reason to refuse
        torch.nn.init.constant_(projection.weight, weight)
        workings.record(model, (rows[:1], None, pooled[:1]), frozenset())
        assert workings.explain(cond, words)
        projected = projection(pooled[:1]).detach() * 3
        assert workings.explain(cond, {"pooled_output": projected}) == explains
    other = cond.clone()
    other[0, 100] += 0.05 * torch.randn(width, generator=g)
    solved, *_ = np.linalg.lstsq(rows[:, 100 - 77].T.double().numpy(), other[0, 100].double().numpy(), rcond=None)
    rest = np.linalg.norm(rows[:, 100 - 77].T.double().numpy() @ solved - other[0, 100].double().numpy())
    assert rest > 1e-3 * float(other[0, 100].norm())  # an independent solver says that it is none
    swapped = cond.roll(1, 1)  # every row a sum of encodes, at another position
    for wrong in (other, swapped, cond[:, :76], cond * float("nan"), torch.cat([cond, cond], -1)):
        assert not workings.explain(wrong, words), wrong.shape
    for beside in ({"pooled_output": torch.randn(1, width, generator=g)}, {"c": torch.zeros(1)}, {"c": object()},
                   {"c": [{"d": torch.zeros(1)}]}, {"pooled_output": "text"}):
        assert not workings.explain(cond, beside), beside
    workings.record(model, (torch.randn(28, 77, width, generator=g), None, pooled[:1].repeat(28, 1)), frozenset())
    assert not workings.explain(cond, words)  # more rows than half the dimensions could explain by chance
    workings.forget()
    assert not workings.explain(cond, words)
    workings.record(model, (rows, None, pooled), frozenset({0}))  # a row of a person who agreed explains nothing
    assert not workings.explain(cond, words)
    with watched.plain():  # nor does a plain negative prompt's
        workings.record(model, (rows[:1], None, pooled[:1]), frozenset())
    assert not workings.explain(cond, words)


def host_module() -> Any:
    """A module with a class and a function, as a host has them."""
    module = types.ModuleType("host_for_hooks")
    exec_source = "class Thing:\n    def work(self, a, b=1):\n        return a + b\ndef plain(cond):\n    return cond\n"
    exec(compile(exec_source, "host_for_hooks", "exec"), module.__dict__)  # noqa: S102 - a module made of constants
    return module


def test_hooks_are_placed_once_and_missed_when_gone(pack: Any) -> None:
    hooks_module, errors = pack("comfy_nodes.enforcement.hooks"), pack("apl_core.errors")
    module, hooks = host_module(), hooks_module.Hooks()
    hooks.place(module, "Thing.work", ("self", "a"), lambda old: lambda self, a, b=1: old(self, a, b) * 10)
    hooks.place(module, "plain", ("cond",), lambda old: lambda cond: [old(cond)])
    assert module.Thing().work(1, 2) == 30 and module.plain(5) == [5] and hooks.missing() == []
    for path, parameters, says in (("Thing.absent", (), "has no"), ("Absent.work", (), "has no"),
                                   ("Thing.work", (), "was replaced by"), ("plain", ("cond",), "was replaced by")):
        with pytest.raises(errors.PolicyError, match=says):
            hooks_module.Hooks().place(module, path, parameters, lambda old: old)
    with pytest.raises(errors.PolicyError, match="expected self, tokens"):
        hooks_module.Hooks().place(host_module(), "Thing.work", ("self", "tokens"), lambda old: old)
    module.plain = module.plain.__wrapped__
    assert hooks.missing() == ["host_for_hooks.plain"]
    module.Thing = type("Thing", (), {})
    assert hooks.missing() == ["host_for_hooks.Thing.work", "host_for_hooks.plain"]


def test_starting_fails_with_78(pack: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        pack("comfy_nodes.enforcement.hooks").refuse_to_start("A reason.")
    assert caught.value.code == 78 and "A reason." in caplog.text


def test_the_status_is_503_until_everything_holds(pack: Any) -> None:
    status = pack("comfy_nodes.enforcement.status").Status
    hooks = pack("comfy_nodes.enforcement.hooks").Hooks()
    module, watched = host_module(), guard(pack)
    hooks.place(module, "plain", ("cond",), lambda old: lambda cond: cond)
    made = status(watched.policy, watched, hooks)
    assert made.report()[0] == 503
    made.self_test = {"ok": True}
    code, body = made.report()
    assert code == 200 and body["ok"] and json.dumps(body) and body["hooks"] == {"host_for_hooks.plain": True}
    module.plain = len
    assert made.report()[0] == 503 and made.report()[1]["hooks"] == {"host_for_hooks.plain": False}
    policy = pack("apl_core.policy").Policy("default_off")
    assert status(policy).report() == (200, status(policy).report()[1])


class Model(types.SimpleNamespace):
    """A text model; like the host's, it can be referred to weakly and is equal to itself alone."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_verification_by_hand(pack: Any) -> None:
    """Rows against a prefix that was put together here; every single number counts."""
    encoding, errors = pack("comfy_nodes.enforcement.encoding"), pack("apl_core.errors")
    watched = guard(pack)
    rows = next(iter(watched.prefixes.values())).vectors()
    weight = types.SimpleNamespace(weight=torch.zeros(77, 8))
    model = Model(embeddings=types.SimpleNamespace(position_embedding=weight))
    good = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(2))
    good[:, 1:5] = rows
    encoding.verify(watched, model, None, good)
    encoding.verify(watched, model, torch.ones(2, 77), good)
    assert watched.counters["verified_rows"] == 4
    nearly, one, moved = good.clone(), good.clone(), good.clone()
    nearly[1, 4, 7] += 1e-6
    one[0, 1:5] = 0
    moved[:, 2:6] = moved[:, 1:5].clone()
    hidden = torch.ones(2, 77)
    hidden[1, 3] = 0
    for embeds, mask in ((nearly, None), (one, None), (moved, None), (None, None), (good[:, :5], None),
                         (good, hidden), (good[0], None), (good.half(), None)):
        with pytest.raises(errors.PolicyError, match="without the anonymization prompt"):
            encoding.verify(watched, model, mask, embeds)
    with watched.plain():
        encoding.verify(watched, model, None, nearly)
    assert watched.counters["plain_negative_rows"] == 2 and watched.counters["refused"] == 8
    wide = Model(embeddings=types.SimpleNamespace(
        position_embedding=types.SimpleNamespace(weight=torch.zeros(77, 16))))
    with pytest.raises(errors.PolicyError):
        encoding.verify(watched, wide, None, torch.zeros(1, 77, 16))
    allowing = guard(pack, unsupported="allow")
    encoding.verify(allowing, wide, None, torch.zeros(3, 77, 16))
    assert allowing.counters["unprotected_rows"] == 3
    with pytest.raises(errors.PolicyError):  # what has a prefix needs it under "allow" too
        encoding.verify(allowing, model, None, nearly)
