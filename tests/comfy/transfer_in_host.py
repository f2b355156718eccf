"""Transfer Anonymization Prompt inside ComfyUI: `transfer_in_host.py HOST REPOSITORY`.

Two checkpoint files hold the host's own text encoders' tables, CLIP-G's made to be CLIP-L's times a known matrix: so
what a prefix must become is known without the node. The last line is JSON: check to what failed ("" for nothing).
"""

from __future__ import annotations

import json
import logging
import sys
import traceback

import in_host
import torch
from in_host import NODES, PACK, SCRATCH, WIDTH_G, WIDTH_L
from safetensors.torch import save_file

FILES = SCRATCH / "models" / "checkpoints"
NODE = NODES["APL_TransferAnonymizationPrompt"]
TEXT = "text_model.embeddings.token_embedding.weight"
MATRIX = torch.randn(WIDTH_L, WIDTH_G, generator=torch.Generator().manual_seed(8))


def table(encoder: object) -> torch.Tensor:
    return encoder.transformer.get_input_embeddings().weight.detach()


def write() -> None:
    """sd1, sdxl, and a refiner, with the host's own tables."""
    FILES.mkdir(parents=True, exist_ok=True)
    small = table(in_host.SD1.cond_stage_model.clip_l).clone()
    with torch.no_grad():
        table(in_host.SDXL.cond_stage_model.clip_l).copy_(small)
        table(in_host.SDXL.cond_stage_model.clip_g).copy_(small @ MATRIX)
    save_file({f"cond_stage_model.transformer.{TEXT}": small}, str(FILES / "one.safetensors"))
    large = {f"conditioner.embedders.0.transformer.{TEXT}": small,
             "conditioner.embedders.1.model.token_embedding.weight": small @ MATRIX}
    save_file({key: value.half().contiguous() for key, value in large.items()}, str(FILES / "xl.safetensors"))
    save_file({"conditioner.embedders.0.model.token_embedding.weight": small}, str(FILES / "refiner.safetensors"))


def run(prefix: object, to: str = "xl.safetensors", method: str = "auto", captions: str = "") -> tuple:
    return NODE.execute(prefix, "one.safetensors", to, method, captions).args


def check_it_becomes_what_the_matrix_says() -> None:
    found, report = run(in_host.AP1)
    wanted = in_host.AP1.vectors() @ MATRIX
    cosine = torch.cosine_similarity(found.vectors("clip_g"), wanted, dim=1).min()
    assert float(cosine) > 0.999, cosine
    assert torch.equal(found.vectors("clip_l"), in_host.AP1.vectors()), "half precision made another table of it"
    assert found.family == "sdxl" and in_host.AP1.content_hash in found.meta.transferred_from
    assert "clip_l: copied" in report and "clip_g: ridge" in report and "vector 9" in report, report


def check_anonymize_and_save_take_it() -> None:
    found, _ = run(in_host.AP1)
    on = NODES["APL_Anonymize"].execute(in_host.SDXL, found, True, "chunk").args[0]
    in_host.differ(in_host.encoded(on, in_host.SHORT), in_host.encoded(in_host.SDXL, in_host.SHORT))
    path = NODES["APL_SaveAnonymizationPrompt"].execute(found, "carried", "", False).args[0]
    again = sys.modules[f"{PACK}.apl_core.prefix"].load_prefix(path, enforce=True)
    assert again.content_hash == found.content_hash and "apl.transfer" in again.meta.extra


def check_captions_choose_the_anchors() -> None:
    words = """dog cat house tree river car city bridge mountain lake table chair lamp book street window door beach
        forest desert horse bird fish boat train plane flower sun moon star cloud"""
    captions = "\n".join(f"a photo of a {word} in the garden" for word in words.split())
    found, _ = run(in_host.AP1, captions=captions)
    record = json.loads(found.meta.extra["apl.transfer"])["clip_g"]
    assert 20 <= record["anchors"] <= 60, record


def check_what_is_refused() -> None:
    in_host.refused(lambda: run(in_host.AP1, "refiner.safetensors"), "refiner")
    in_host.refused(lambda: run(in_host.AP2), "several tensors")
    in_host.refused(lambda: run(in_host.AP1, captions="one"), "tokens are left")
    assert NODE.validate_inputs("(none found)", "xl.safetensors") is not True
    assert NODE.validate_inputs("one.safetensors", "xl.safetensors") is True


def check_only_safetensors_are_offered() -> None:
    (FILES / "old.ckpt").write_bytes(b"\x80\x02")
    offered = NODE.GET_NODE_INFO_V1()["input"]["required"]["from_checkpoint"]
    names = offered[0] if isinstance(offered[0], list) else offered[1]["options"]
    assert "one.safetensors" in names and "old.ckpt" not in names, names


def main() -> None:
    logging.disable(logging.WARNING)
    write()
    results = {}
    for name, check in [(n, f) for n, f in globals().items() if n.startswith("check_")]:
        try:
            with torch.inference_mode():
                check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc(limit=-4)
    sys.stdout.write("\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
