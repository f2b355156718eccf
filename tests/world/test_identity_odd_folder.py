"""A folder of everything that goes wrong with picture files, through the shipped recogniser and the whole command.

The recogniser is the real one of the miniature world, run by insightface's `ArcFaceONNX`. Every unusual file must be
listed with its reason and no other; none may stop the check. Run as a claim, the number of those that are not is noted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("insightface")
pytest.importorskip("jinja2")

from apl_train import shipped
from apl_train.commands.cli import main
from apl_train.scoring.persons import read_evaluation_set

pytestmark = pytest.mark.world


def odd_files(folder: Path, portrait: np.ndarray) -> dict[str, str]:
    """Writes the files; returns file to a word of the reason that must be listed."""
    image = Image.fromarray(portrait)
    two = np.concatenate([portrait, portrait], axis=1)
    deep = (portrait.astype(np.uint32).mean(axis=2) * 257).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6

    def put(name: str, picture: Image.Image | np.ndarray, **options: object) -> None:
        picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        picture.save(folder / name, **options)

    put("broken.png", image)
    data = (folder / "broken.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "notes.txt").write_text("nor is this")
    put("grey.png", image.convert("L"))
    put("tiny.png", portrait[:6, :6])
    put("small.png", image.resize((24, 24)))
    put("strip.png", np.zeros((40, 900, 3), np.uint8))
    put("deep.png", deep)
    put("moving.gif", image.convert("P"), save_all=True, append_images=[Image.fromarray(two[:, 64:192])], duration=80)
    put("moving.webp", image, save_all=True, append_images=[image.rotate(5)], duration=80)
    put("cmyk.jpg", image.convert("CMYK"), quality=95)
    put("cmyk.tif", image.convert("CMYK"))
    put("float.tif", Image.fromarray(portrait.astype(np.float32).mean(axis=2) / 255))
    put("turned.jpg", image.rotate(90), exif=exif, quality=95)
    put("clear.png", np.dstack([portrait, np.full(portrait.shape[:2], 100, np.uint8)]))
    put("nobody.png", np.full((128, 128, 3), 90, np.uint8))
    put("again.png", image)
    put("once.png", image)
    return {"broken.png": "broken", "empty.jpg": "empty", "text.png": "broken, or none of", "notes.txt": "no picture",
            "grey.png": "grey", "tiny.png": "tiny", "small.png": "tiny", "strip.png": "narrow strip",
            "deep.png": "16 bits", "moving.gif": "animated", "moving.webp": "animated", "cmyk.jpg": "CMYK",
            "cmyk.tif": "CMYK", "float.tif": "floating point", "turned.jpg": "EXIF", "clear.png": "transparent",
            "nobody.png": "no face", "once.png": "the same file as"}


def test_every_oddity_is_listed_and_none_stops_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = read_evaluation_set(shipped.ASSETS)
    person = people.of_split("test", 1)[0]
    references = people.references(person)
    for side in ("refs", "off"):
        (tmp_path / side / person.name).mkdir(parents=True)
    for i, reference in enumerate(references):
        Image.fromarray(reference).save(tmp_path / "refs" / person.name / f"{i}.png")
    wanted = odd_files(tmp_path / "off" / person.name, references[0])
    out = tmp_path / "out" / "check.json"
    assert main(["score", "--images", str(tmp_path / "off"), "--references", str(tmp_path / "refs"), "--out", str(out),
                 "--cache", str(tmp_path / "cache"), "--threshold", "0.5"]) == 0
    assert "Unusual files" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    listed: dict[str, list[str]] = {}
    for row in found["odd"]:
        listed.setdefault(Path(row["file"]).name, []).append(row["reason"])
    unlisted = [name for name, word in wanted.items() if not any(word in reason for reason in listed.get(name, []))]
    if os.environ.get("APL_RECORD_CLAIMS"):
        from apl_train import claims

        claims.record({"identity-odd": (float(len(unlisted)), None, len(wanted))})
    assert not unlisted, {name: listed.get(name) for name in unlisted}
    assert set(listed) == set(wanted)  # again.png is an ordinary picture: not listed
    row = found["recognisers"][0]["off"]
    assert row["n_images"] == len(wanted) + 1 - 4  # those that hold no picture are none
    assert row["n_faces"] < row["n_images"]  # nobody.png is one, without a face
    # the portrait itself, in whatever file, is recognised
    assert row["recognised"]["value"] >= 8 / 15
