"""What pictures say of the prefix they were made with: recorded when the node ran, recalled when it did not."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from in_pack import module

provenance = module("comfy_nodes.provenance")
prefixes, metadata = module("apl_core.prefix"), module("apl_core.metadata")

GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
    "2": {"class_type": "APL_LoadAnonymizationPrompt", "inputs": {"prompt_name": "p", "level": 0}},
    "3": {"class_type": "APL_Anonymize", "inputs": {"clip": ["1", 1], "anonymization_prompt": ["2", 0]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 0], "text": "a secret"}},
}


def _prefix(level: int | None = None):
    meta = metadata.PrefixMetadata(title="a name", level=level)
    return prefixes.AnonymizationPrompt("sd1", {"emb_params": torch.ones(10, 768)}, meta)


def _ran(graph: dict, prefix) -> dict:
    extra: dict = {"workflow": {}}
    provenance.record(prefix, SimpleNamespace(unique_id="3", prompt=graph, extra_pnginfo=extra))
    return extra


def test_a_node_that_runs_writes_name_hash_and_level_and_no_word_of_the_prompt() -> None:
    prefix = _prefix(400)
    extra = _ran(GRAPH, prefix)
    assert extra[provenance.KEY] == {"3": {"name": "a name", "content_hash": prefix.content_hash, "level": 400}}
    assert "secret" not in str(extra)


def test_a_cached_node_is_recalled_while_everything_upstream_is_the_same() -> None:
    prefix = _prefix()
    _ran(GRAPH, prefix)
    later = copy.deepcopy(GRAPH)
    later["4"]["inputs"]["text"] = "another text"  # downstream: the node itself stays cached
    request = provenance.recall({"prompt": later})
    assert request["extra_data"]["extra_pnginfo"][provenance.KEY]["3"]["content_hash"] == prefix.content_hash


def test_nothing_is_claimed_when_something_upstream_differs() -> None:
    _ran(GRAPH, _prefix())
    other = copy.deepcopy(GRAPH)
    other["2"]["inputs"]["level"] = 200
    assert provenance.recall({"prompt": other})["extra_data"]["extra_pnginfo"][provenance.KEY] == {}


def test_what_a_loaded_picture_claimed_is_dropped() -> None:
    other = copy.deepcopy(GRAPH)
    other["1"]["inputs"]["ckpt_name"] = "never-seen"
    request = {"prompt": other, "extra_data": {"extra_pnginfo": {provenance.KEY: {"3": {"name": "forged"}}}}}
    assert provenance.recall(request)["extra_data"]["extra_pnginfo"][provenance.KEY] == {}


def test_prompts_without_the_node_and_malformed_ones_pass_untouched() -> None:
    for request in ({}, {"prompt": None}, {"prompt": {"1": GRAPH["1"]}}, {"prompt": {"1": "x"}}, {"prompt": []}):
        assert provenance.recall(copy.deepcopy(request)) == request
    broken = {"prompt": {"3": {"class_type": "APL_Anonymize", "inputs": {"clip": ["9", 0]}}}}
    assert provenance.recall(broken)["extra_data"]["extra_pnginfo"][provenance.KEY] == {}
    loop = {"3": {"class_type": "APL_Anonymize", "inputs": {"clip": ["3", 0]}}}
    assert provenance.upstream(loop, "3") is None


def test_the_hosts_cache_knows_no_numbers_of_nodes() -> None:
    prefix = _prefix()
    _ran(GRAPH, prefix)
    number = {"1": "7", "2": "9", "3": "12", "4": "20"}
    renamed = {number[key]: {"class_type": node["class_type"], "inputs": {
        name: [number[value[0]], value[1]] if isinstance(value, list) else value
        for name, value in node["inputs"].items()}} for key, node in GRAPH.items()}
    said = provenance.recall({"prompt": renamed})["extra_data"]["extra_pnginfo"][provenance.KEY]
    assert said == {"12": provenance.facts_of(prefix)}


def test_a_node_run_outside_a_prompt_records_nothing() -> None:
    provenance.record(_prefix(), None)
