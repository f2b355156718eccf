"""What the project promises: every target that is measured, its bound, and the command that measures it."""

from __future__ import annotations

from dataclasses import dataclass

CARD = "apl miniworld card"
PREFIX = "apl miniworld prefix"
BASELINES = "apl baselines"
TABLE2 = "apl evaluate --preset miniature --only table2"
FIG5 = "apl evaluate --preset miniature --only fig5"
FIG6 = "apl evaluate --preset miniature --only fig6"
FIG7 = "apl evaluate --preset miniature --only fig7"
RELATIVES = "apl miniworld carry --only relatives"
MAP = "python benchmarks/transfer_cost.py map"
SEARCH = "python benchmarks/transfer_cost.py search"
AGREE = "python benchmarks/transfer_cost.py agree"
CARRY = "apl miniworld carry --only transfer"
RESUME = "python -m pytest tests/world/test_resume.py"
DEMO = "python install.py demo"
REAL = "python benchmarks/real_sd15.py"
STEP_FLOPS = "python benchmarks/step_cost.py flops"
STEP_SECONDS = "python benchmarks/step_cost.py seconds"
SAMPLES = "python benchmarks/samples_to_target.py"
PROCESSES = "python -m pytest tests/unit/test_processes.py"
COMFY = "python benchmarks/comfyui_cost.py"
COMFY_ENFORCED = "python benchmarks/comfyui_enforcement.py"
COMFY_PICTURES = "python -m pytest tests/comfy/test_miniature_in_host.py"
COMFY_SDXL = "python -m pytest tests/comfy/test_miniature_sdxl_in_host.py"
COMFY_LIVE = "python -m pytest tests/comfy/test_workflows_live.py"
WEBUI = "python benchmarks/webui_cost.py"
WEBUI_PICTURES = "python -m pytest tests/a1111/test_miniature_in_webui.py"
WEBUI_SDXL = "python -m pytest tests/a1111/test_miniature_sdxl_in_webui.py"
SCORING = "python benchmarks/scoring_cost.py"
DLIB = "python -m pytest tests/unit/test_identity_dlib.py"
ODD = "python -m pytest tests/world/test_identity_odd_folder.py"
BEYOND = "python benchmarks/beyond.py --only"
SDXL_FLOPS = "python benchmarks/step_cost_sdxl.py"
STEP_MEMORY = "python benchmarks/step_memory.py"
LOOPS = "python benchmarks/published_loops.py"
ENCODE = "python benchmarks/encode_cost.py"
TWO = "python benchmarks/two_processes.py"
SECOND = "python benchmarks/second_run.py"


@dataclass(frozen=True)
class Target:
    """One promise. `bound` is "<= x" or ">= x"."""

    claim: str
    bound: str
    command: str
    issue: str = "main"


TARGETS: dict[str, Target] = {
    "base-id-acc": Target("base model: ID-ACC mean on S_test", ">= 0.60", CARD),
    "same-person": Target("two renders of one person: mean similarity", ">= 0.85", CARD),
    "impostors": Target("renders of two persons of one gender and race: mean similarity", "<= 0.05", CARD),
    "description-share": Target("c2 alone: ID-ACC / base's, S_test", "<= 0.1667", CARD),
    "base-attributes": Target("base model: attributes right, S_test", ">= 0.85", CARD),
    "attributes-renders": Target("attribute model: right on renders", ">= 0.95", CARD),
    "person-faces": Target("base model: a face in person prompts", ">= 0.97", CARD),
    "thing-faces": Target("base model: a face in non-face prompts", "<= 0.03", CARD),
    "verification": Target("recogniser: verification on held-out persons", ">= 0.99", CARD),
    "reconstruction": Target("recogniser: verification on VAE reconstructions / on renders", ">= 0.97", CARD),
    "filler": Target("ten filler tokens ahead: ID-ACC / base's, S_test", ">= 0.90", CARD),
    "on-test": Target("shipped prefix: ID-ACC / base's, S_test", "<= 0.20", PREFIX),
    "train-test-gap": Target("shipped prefix: distance of ID-ACC between S_ID and S_test", "<= 0.03", PREFIX),
    "attributes-kept": Target("shipped prefix: Attr-ACC / base's, S_test", ">= 0.87", PREFIX),
    "faces-kept": Target("shipped prefix: a face in person prompts, S_test", ">= 0.97", PREFIX),
    "drift-things": Target("shipped prefix: drift of non-faces / two seeds", "<= 0.20", PREFIX),
    "drift-unnamed": Target("shipped prefix: drift of unnamed faces / two seeds", "<= 0.20", PREFIX),
    "drift-things-random": Target("shipped prefix: drift of non-faces / a random prefix's", "<= 1.0", PREFIX),
    "drift-unnamed-random": Target("shipped prefix: drift of unnamed faces / a random prefix's", "<= 1.0", PREFIX),
    "uninvited": Target("shipped prefix: named persons in neutral pictures, beyond the base's", "<= 0.0", PREFIX),
    "things-to-faces": Target("shipped prefix: faces in non-face pictures, beyond the base's", "<= 0.0", PREFIX),
    "random-keeps": Target("random prefix of equal norm: ID-ACC / base's, S_test", ">= 0.90", PREFIX),
    "beats-phrase-joint": Target("joint success: prefix - best phrase, S_test", ">= 0.0", PREFIX),
    "beats-phrase-drift": Target("drift of neutral prompts: prefix / best phrase", "<= 1.0", PREFIX),
    "second-recogniser": Target("shipped prefix, second recogniser: ID-ACC / base's, S_test", "<= 0.20", PREFIX),
    "final-on": Target("persons kept out of all decisions: ID-ACC / base's", "<= 0.20", PREFIX),
    "kept-1.4": Target('relative "1.4": share of the drop that the same file keeps', ">= 0.80", RELATIVES, "transfer"),
    "kept-realistic": Target('relative "realistic": share of the drop that the same file keeps', ">= 0.70", RELATIVES,
                             "transfer"),
    "transfer-kept": Target("miniature SDXL: carried prefix's drop / the native one's", ">= 0.80", CARRY, "transfer"),
    "demo-minutes": Target("demo from clone to report, minutes on two cores", "<= 10", DEMO),
    "demo-train-minutes": Target("demo: minutes of training", "<= 5", DEMO),
    "demo-memory": Target("demo: peak memory, GB", "<= 4", DEMO),
    "demo-drop": Target("demo's own prefix: its drop / the shipped one's", ">= 0.80", DEMO),
    "kill-resume": Target("20 steps = 10 + kill -9 + 10, equal runs of 20 kill points", ">= 20", RESUME),
    "no-reg": Target("without regularisation: persons or faces in non-face pictures", ">= 0.10", FIG7),
    "real-gradient": Target("SD1.5 at full size: prefix gradient off a reference, parts per million", "<= 10", REAL,
                            "real"),
    "real-forms": Target("SD1.5 at full size: single file's predictions off the folder's", "<= 0.0", REAL, "real"),
    "real-memory": Target("SD1.5 at full size: memory estimate off the measured peak", "<= 0.15", REAL, "real"),
    "comfy-noise": Target("ComfyUI, miniature: largest difference of noise predictions from diffusers'", "<= 0.0001",
                          COMFY_PICTURES, "comfyui"),
    "comfy-id-acc-off": Target("ComfyUI, miniature, S_test: ID-ACC off, distance from diffusers'", "<= 0.03",
                               COMFY_PICTURES, "comfyui"),
    "comfy-id-acc-on": Target("ComfyUI, miniature, S_test: ID-ACC on, distance from diffusers'", "<= 0.03",
                              COMFY_PICTURES, "comfyui"),
    "comfy-sdxl-noise": Target("ComfyUI, miniature SDXL: largest difference of noise predictions from diffusers'",
                               "<= 0.0001", COMFY_SDXL, "transfer"),
    "comfy-sdxl-pictures": Target("ComfyUI, miniature SDXL: a picture's mean difference from diffusers', of 255",
                                  "<= 2", COMFY_SDXL, "transfer"),
    "comfy-interrupt": Target("ComfyUI: seconds from interrupt to a training that saved and ended", "<= 2", COMFY_LIVE,
                              "comfyui"),
    "comfy-import": Target("ComfyUI: import of the pack, ms of CPU", "<= 50", COMFY, "comfyui"),
    "comfy-foreign": Target("ComfyUI: packages of others that the import brings", "<= 0", COMFY, "comfyui"),
    "comfy-encode": Target("ComfyUI: an encode with the prefix / one without, equal chunks", "<= 1.02", COMFY,
                           "comfyui"),
    "comfy-sampling": Target("ComfyUI, miniature: sampling with the prefix / without", "<= 1.02", COMFY,
                             "comfyui"),
    "comfy-enforcement": Target("ComfyUI: an encode on an enforced server / on an ordinary one", "<= 1.02",
                                COMFY_ENFORCED, "comfyui"),
    "flops-paper": Target("SD1.5, preset sd15-fast: FLOPs a sample / the paper's code", "<= 0.40", STEP_FLOPS,
                          "real"),
    "flops-floor": Target("SD1.5, preset sd15-fast: FLOPs a sample / the floor", "<= 1.15", STEP_FLOPS, "real"),
    "step-paper": Target("miniature, preset fast: seconds a sample / the paper's code", "<= 0.5", STEP_SECONDS,
                         "real"),
    "step-inversion": Target("miniature, preset fast: seconds a sample / diffusers' textual_inversion", "<= 0.8",
                             STEP_SECONDS, "real"),
    "samples-to-target": Target("miniature: samples until ID-ACC falls to a share of the base's / the paper's setting",
                                "<= 0.2", SAMPLES, "real"),
    "two-processes": Target("two processes: an element's largest difference from one process's, millionths", "<= 100",
                            PROCESSES, "real"),
    "real-8gb": Target("preset sd15-8gb on a GPU, by the estimate: peak memory, GB", "<= 7.5", REAL, "real"),
    "webui-noise": Target("WebUI, miniature: largest difference of noise predictions from diffusers'", "<= 0.0001",
                          WEBUI_PICTURES, "webui"),
    "webui-id-acc-off": Target("WebUI, miniature, S_test: ID-ACC off, distance from diffusers'", "<= 0.03",
                               WEBUI_PICTURES, "webui"),
    "webui-id-acc-on": Target("WebUI, miniature, S_test: ID-ACC on, distance from diffusers'", "<= 0.03",
                              WEBUI_PICTURES, "webui"),
    "webui-sdxl-noise-off": Target("WebUI, miniature SDXL, no prefix: largest difference of noise predictions",
                                   "<= 0.0001", WEBUI_SDXL, "transfer"),
    "webui-sdxl-noise-on": Target("WebUI, miniature SDXL, a prefix: largest difference of noise predictions",
                                  "<= 0.0001", WEBUI_SDXL, "transfer"),
    "webui-sdxl-pictures": Target("WebUI, miniature SDXL: a picture's mean difference from diffusers', of 255",
                                  "<= 2", WEBUI_SDXL, "transfer"),
    "webui-import": Target("WebUI: import of the extension, ms of CPU", "<= 50", WEBUI, "webui"),
    "webui-foreign": Target("WebUI: packages of others that the import brings", "<= 0", WEBUI, "webui"),
    "webui-encode": Target("WebUI: an encode with the prefix / one without, equal chunks", "<= 1.02", WEBUI, "webui"),
    "webui-startup": Target("WebUI: CPU time of a start with the extension / without", "<= 1.05", WEBUI, "webui"),
    "sdxl-flops-paper": Target("SDXL at 1024 px, preset sdxl-fast: FLOPs a sample / the paper's way", "<= 0.40",
                               SDXL_FLOPS, "evaluation"),
    "sdxl-flops-floor": Target("SDXL at 1024 px, preset sdxl-fast: FLOPs a sample / the floor", "<= 1.15",
                               SDXL_FLOPS, "evaluation"),
    "memory-paper": Target("SD1.5 at full size, one sample: memory of our step / the paper's code, counted", "<= 1.0",
                           STEP_MEMORY, "evaluation"),
    "memory-inversion": Target("SD1.5 at full size, one sample: memory of our step / diffusers' inversion, counted",
                               "<= 1.0", STEP_MEMORY, "evaluation"),
    "loop-inversion": Target("miniature, preset fast: seconds a sample / diffusers' own textual_inversion.py", "<= 0.8",
                             LOOPS, "evaluation"),
    "encode-diffusers": Target("CLIP-L at full size: an encode with the prefix / one without", "<= 1.02", ENCODE,
                               "evaluation"),
    "two-generate": Target("generation: one process's time / that of the busier of two", ">= 1.8", TWO, "evaluation"),
    "two-score": Target("scoring: one process's time / that of the busier of two", ">= 1.8", TWO, "evaluation"),
    "beyond-strength": Target("strength from 0 to 1: largest rise of ID-ACC between steps, beyond the interval",
                              "<= 0.0", f"{BEYOND} strength", "evaluation"),
    "beyond-pseudo": Target("persons taught by DreamBooth: share of ID-ACC that `miniature-pseudo` takes",
                            ">= 0.5", f"{BEYOND} pseudo", "evaluation"),
    "scoring-speed": Target("500 pictures scored: pictures a second / those of insightface's usual loop", ">= 1.5",
                            SCORING, "transfer"),
    "dlib-pairs": Target("dlib, six faces and copies of them: pairs judged wrongly", "<= 0", DLIB, "transfer"),
    "identity-odd": Target("a folder of odd files: those not listed with their reason", "<= 0", ODD, "transfer"),
    "transfer-seconds": Target("transfer at full size, files to prefix with its report, two cores: s", "<= 5", MAP,
                               "transfer"),
    "transfer-memory": Target("transfer at full size: peak memory, GB", "<= 2", MAP, "transfer"),
    "transfer-agreement": Target("PTfer: cosine of the closed form to the published search once it stands still",
                                 ">= 0.995", AGREE, "transfer"),
    "transfer-identity": Target("a table carried to itself: cosine", ">= 0.9999", AGREE, "transfer"),
    "transfer-speed": Target("PTfer at full size: seconds of the published search / the closed form's", ">= 50", SEARCH,
                             "transfer"),
    "transfer-loss": Target("PTfer at full size: loss of the closed form / the search's", "<= 1.0", SEARCH, "transfer"),
    "levels-fall": Target("levels: largest rise of ID-ACC between levels, beyond the interval", "<= 0.0", FIG6),
    "baselines-unseen": Target("unseen persons: the list method that comes nearest, ID-ACC / base's", ">= 0.80",
                               BASELINES, "evaluation"),
    "baselines-joint": Target("unseen persons: joint success of the prefix - of the best list method", ">= 0.0",
                              BASELINES, "evaluation"),
    "table2-id-acc": Target("Table 2, miniature: shipped prefix, ID-ACC / base's, S_test", "<= 0.20", TABLE2,
                            "evaluation"),
    "table2-fid-id": Target("Table 2, miniature: ID FID / the best of those that take as much identity", "<= 1.0",
                            TABLE2, "evaluation"),
    "table2-attr-acc": Target("Table 2, miniature: the best Attr-ACC of those / the prefix's", "<= 1.0", TABLE2,
                              "evaluation"),
    "table2-fid-other": Target("Table 2, miniature: neutral FID / the best of those", "<= 1.0", TABLE2, "evaluation"),
    "dreambooth-drop": Target("persons taught by DreamBooth to an ID-ACC of 0.53, miniature: share that "
                              "`miniature-pseudo` takes", ">= 0.50", FIG5, "evaluation"),
    "dreambooth-lora-drop": Target("persons taught by DreamBooth with LoRA to an ID-ACC of 0.53, miniature: the same",
                                   ">= 0.50", FIG5, "evaluation"),
    "second-run": Target("second run on a fresh clone: figures of the tables and cards outside their 95% interval",
                         "<= 0", SECOND, "evaluation"),
}

MEASURED_ON: dict[str, tuple[str, ...]] = {
    CARD: ("world",), SAMPLES: ("world",), PREFIX: ("world", "prefix"), DEMO: ("world", "prefix"),
    RELATIVES: ("world", "relatives", "prefix"), CARRY: ("world", "sdxl", "prefix"),
    COMFY_SDXL: ("world", "sdxl", "prefix"), WEBUI_SDXL: ("world", "sdxl", "prefix"),
    **dict.fromkeys((FIG5, FIG6, FIG7, TABLE2, SECOND, BASELINES, f"{BEYOND} strength", f"{BEYOND} pseudo",
                     COMFY_PICTURES, WEBUI_PICTURES), ("world", "prefix")),
}
"""What a command's figures are of: the miniature world, its relatives, the miniature SDXL, the shipped prefix."""
