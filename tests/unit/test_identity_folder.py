"""A check of folders against sums by hand: whose file it is, what is counted, what is listed, what is kept on disk."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes.colour_faces import ColourFaces, picture

from apl_core.errors import DatasetError, ScoreError
from apl_train.commands.cli import main
from apl_train.datasets.pictures import PictureFolder
from apl_train.folder_score import face_cache
from apl_train.folder_score.face_cache import FaceCache, look
from apl_train.folder_score.files import FolderSettings
from apl_train.folder_score.people import persons_of_pictures, persons_of_references, read_groups, read_table
from apl_train.folder_score.score import check_folder
from apl_train.folder_score.text import markdown

ROOT = Path(__file__).resolve().parents[2]


def put(folder: Path, name: str, *faces: tuple[int, int, int] | None) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    picture(*faces).save(folder / name)


# --- whose picture ----------------------------------------------------------------------------------------------------

def test_references_by_folder_or_by_name_without_number() -> None:
    files = ["Anna Berg/1.jpg", "Anna Berg/2.jpg", "bo_lind_01.png", "bo_lind_2.png", "cy (3).png", "2024.png"]
    assert persons_of_references(files) == {"Anna Berg": ("Anna Berg/1.jpg", "Anna Berg/2.jpg"),
                                            "bo_lind": ("bo_lind_01.png", "bo_lind_2.png"), "cy": ("cy (3).png",),
                                            "person": ("2024.png",)}
    with pytest.raises(DatasetError, match="no reference"):
        persons_of_references([])


def test_pictures_by_folder_by_name_by_table() -> None:
    known = ["Anna", "Anna Berg", "José"]
    names = ["anna_berg/x.png", "out/ANNA-berg__7.png", "anna 3.png", "anna7.png", "annabel.png", "josé_1.png", "z.png"]
    found = persons_of_pictures(names, known)
    assert found.persons == {"Anna": ("anna 3.png", "anna7.png"), "José": ("josé_1.png",),
                             "Anna Berg": ("anna_berg/x.png", "out/ANNA-berg__7.png")}
    assert [name for name, _ in found.left] == ["annabel.png", "z.png"]
    table = {"z.png": "anna", "anna 3.png": "Nobody"}
    told = persons_of_pictures(names, known, table)
    assert told.persons["Anna"] == ("z.png",) and dict(told.left)["anna 3.png"] == "belongs to nobody in the references"
    assert dict(told.left)["anna7.png"] == "is not in the table"
    assert persons_of_pictures(["a.png", "b/c.png"], ["me"]).persons == {"me": ("a.png", "b/c.png")}


def test_tables_say_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("file,person\nsub\\a.png, Anna \nb.png,\n")
    assert read_table(file) == {"sub/a.png": "Anna"}
    file.write_text("name,gender,race\nanna,f,x\nbo,m,\nnobody,f,x\nanna,f,x\n")
    assert read_groups(file, ["Anna", "Bo"]) == {"gender": {"f": ["Anna"], "m": ["Bo"]}, "race": {"x": ["Anna"]}}
    for text, match in (("a,b\n1,2\n", "no column file"), ("", "no column file")):
        file.write_text(text)
        with pytest.raises(DatasetError, match=match):
            read_table(file)
    file.write_text("name,gender\nzoe,f\n")
    with pytest.raises(DatasetError, match="nobody of the references"):
        read_groups(file, ["Anna"])
    file.write_bytes(b"file,person\n\xff\xfe,x\n")
    with pytest.raises(DatasetError, match="UTF-8"):
        read_table(file)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_table(tmp_path / "none.csv")


# --- scores -----------------------------------------------------------------------------------------------------------

X, Y, XY = (200, 0, 9), (0, 200, 9), (120, 120, 9)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Anna looks along X, Bo along Y. Off: mostly themselves; on: both half-way, one of Bo's without a face."""
    for i in (1, 2):
        put(tmp_path / "refs", f"anna/{i}.png", X)
        put(tmp_path / "refs", f"bo/{i}.png", Y)
    put(tmp_path / "refs", "anna/3.png", X, Y)
    put(tmp_path / "refs", "bo/3.png", None)
    for name, faces in (("anna_1", [X]), ("anna_2", [XY, (0, 200, 31)]), ("bo_1", [Y]), ("bo_2", [X])):
        put(tmp_path / "off", f"{name}.png", *faces)
    for name, faces in (("anna_1", [XY]), ("anna_2", [XY]), ("bo_1", [XY]), ("bo_2", [None])):
        put(tmp_path / "on", f"{name}.png", *faces)
    return tmp_path


def test_figures_by_hand(folders: Path) -> None:
    settings = FolderSettings(folders / "off", folders / "refs", folders / "on", threshold=0.9)
    found = check_folder(settings, [ColourFaces()]).scores
    block, half = found["recognisers"][0], math.sqrt(0.5)
    assert block["off"]["id_acc_mean"]["value"] == pytest.approx(((1 + 0) / 2 + (1 + 0) / 2) / 2)  # anna_2: Y is larger
    assert block["off"]["id_acc_max"]["value"] == pytest.approx(1)
    assert block["on"]["id_acc_mean"]["value"] == pytest.approx(half)
    assert block["on"]["face_rate"]["value"] == pytest.approx(3 / 4)  # no face is never a similarity ...
    assert block["on"]["joint_success"]["value"] == pytest.approx(3 / 4)  # ... and never a success
    assert block["off"]["recognised"]["value"] == pytest.approx(2 / 4)
    assert block["off"]["worst_of_k"] == pytest.approx({"value": 1.0, "lo": 1.0, "hi": 1.0, "k": 2})
    assert block["change"]["ratio"]["value"] == pytest.approx(half / 0.5)
    assert block["change"]["face_rate"]["value"] == pytest.approx(-1 / 4)
    assert block["ceiling"] == pytest.approx(1)
    assert block["strangers"] == pytest.approx((0 + 1 + 0 + 1) / 4)  # bo_2 is Anna, anna_2's largest is Bo
    assert block["rejected_references"] == {
        "anna": [{"file": "anna/3.png", "reason": "2 faces were found"}],
        "bo": [{"file": "bo/3.png", "reason": "no face was found"}]}
    assert block["persons"][1]["on"] == pytest.approx(
        {"mean": half, "max": half, "n_images": 2, "n_faces": 1, "recognised": 0})
    assert found["paired_names"] == {"off": 4, "on": 4, "both": 4}
    json.dumps(found, allow_nan=False)
    text = markdown(found)
    assert "0.707" in text and "anna/3.png (2 faces were found)" in text and "nan" not in text


def test_the_choice_of_face(folders: Path) -> None:
    def mean(choice: str) -> float:
        settings = FolderSettings(folders / "off", folders / "refs", face_choice=choice, threshold=0.9)
        return check_folder(settings, [ColourFaces()]).scores["recognisers"][0]["persons"][0]["off"]["mean"]
    half = math.sqrt(0.5)
    assert mean("largest") == pytest.approx((1 + 0) / 2)
    assert mean("best") == pytest.approx((1 + half) / 2)
    assert mean("all") == pytest.approx((1 + half + 0) / 3)


def test_a_threshold_from_strangers_and_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    people = [f"p{chr(97 + i)}" for i in range(12)]
    for i, name in enumerate(people):
        angle = np.pi / 2 * i / 11
        for k in range(10):
            a = np.clip(angle + rng.normal() * 0.02, 0, np.pi / 2)
            place = tmp_path / ("refs" if k < 3 else "off") / name
            put(place, f"{k}.png", (int(250 * np.cos(a)), int(250 * np.sin(a)), 9))
    (tmp_path / "groups.csv").write_text("name,half\n" + "".join(
        f"{name},{'low' if i < 10 else 'high'}\n" for i, name in enumerate(people)))
    settings = FolderSettings(tmp_path / "off", tmp_path / "refs", groups=tmp_path / "groups.csv", far=1e-2)
    result = check_folder(settings, [ColourFaces()])
    block, scored = result.scores["recognisers"][0], result.scored[0]
    assert block["threshold"]["source"] == "impostors" and block["threshold"]["impostors"] == 12 * 11 * 7
    # by hand: every picture's feature against everyone else's reference
    values = []
    seen = result.looked[0].sides["off"]
    for own, names in scored.files["off"].items():
        for other in people:
            if other != own:
                features = np.stack([seen[n].faces[0].embedding for n in names]).astype(np.float64)
                features /= np.linalg.norm(features, axis=1, keepdims=True)
                values += list(features @ scored.references[other].vector)
    limit = block["threshold"]["value"]
    assert np.mean(np.array(values) >= limit) <= 0.01 < np.mean(np.array(values) >= limit - 1e-4)
    assert [row["threshold"] is None for row in block["at_far"]] == [True, True, False]
    low, high = block["groups"]
    assert (low["group"], low["n_persons"], low["too_few"]) == ("low", 10, False)
    assert (high["n_persons"], high["too_few"]) == (2, True) and "off" not in high
    means = [p.mean for p in scored.sides["off"][:10]]
    assert low["off"]["id_acc_mean"]["value"] == pytest.approx(np.mean(means))
    assert low["own_threshold"]["impostors"] == 10 * 9 * 7


def test_two_recognisers_side_by_side(folders: Path) -> None:
    settings = FolderSettings(folders / "off", folders / "refs", threshold=0.9)

    class Swapped(ColourFaces):
        def faces(self, image: np.ndarray) -> list:
            return super().faces(np.where(image[..., :1] > 0, (120, 120, 9), image).astype(np.uint8))

    found = check_folder(settings, [ColourFaces(), Swapped("second", "c1")]).scores
    assert [block["name"] for block in found["recognisers"]] == ["colour", "second"]
    assert found["agreement"]["off"]["pictures"] == 4
    assert "equal verdicts on 4 pictures" in markdown(found)


def test_people_without_a_usable_reference_or_picture_are_named(folders: Path) -> None:
    put(folders / "refs", "cy/1.png", None)
    put(folders / "off", "cy_1.png", X)
    put(folders / "refs", "di/1.png", X)
    (folders / "off" / "stray.png").write_bytes((folders / "off" / "bo_1.png").read_bytes())
    found = check_folder(FolderSettings(folders / "off", folders / "refs"), [ColourFaces()]).scores
    block = found["recognisers"][0]
    assert "exactly one face" in block["left_out"]["cy"] and block["left_out"]["di"] == "no sound picture (off)"
    assert {"folder": "off", "file": "stray.png", "reason": "belongs to nobody in the references"} in found["odd"]
    assert block["threshold"]["source"] == "none" and block["off"]["recognised"] is None


@pytest.mark.parametrize(("changes", "field"), [
    ({"far": 0.0}, "far"), ({"threshold": 2.0}, "threshold"), ({"k": 0}, "k"), ({"face_choice": "any"}, "face_choice"),
])
def test_wrong_settings_are_named(folders: Path, changes: dict, field: str) -> None:
    with pytest.raises(ScoreError) as caught:
        FolderSettings(folders / "off", folders / "refs", **changes)
    assert caught.value.field == field and caught.value.hint
    with pytest.raises(DatasetError, match="no folder"):
        FolderSettings(folders / "nowhere", folders / "refs")
    with pytest.raises(ScoreError, match="k is 9"):
        check_folder(FolderSettings(folders / "off", folders / "refs", k=9, threshold=0.5), [ColourFaces()])


# --- what is kept -----------------------------------------------------------------------------------------------------

def test_equal_files_are_looked_at_once_and_never_twice(folders: Path, tmp_path: Path) -> None:
    store, first = PictureFolder(folders / "off"), ColourFaces()
    names = sorted(store.names())
    seen = look(store, names, first, FaceCache(tmp_path / "kept", first))
    assert first.looked == 3 and len(seen) == 4  # anna_1 and bo_2 are one file's bytes
    (folders / "off" / "again.png").write_bytes((folders / "off" / "bo_1.png").read_bytes())
    again = ColourFaces()
    more = look(store, [*names, "again.png"], again, FaceCache(tmp_path / "kept", again))
    assert again.looked == 0 and more["again.png"].sha256 == more["bo_1.png"].sha256
    for name in names:
        for a, b in zip(seen[name].faces, more[name].faces, strict=True):
            assert a.box == b.box and (a.embedding == b.embedding).all()
    other = ColourFaces(det_size=320)  # other settings are another recogniser
    assert len(FaceCache(tmp_path / "kept", other)) == 0
    # a damaged file is left alone and its pictures are looked at again
    kept = next((tmp_path / "kept").iterdir())
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.write_bytes(data)
    assert len(FaceCache(tmp_path / "kept", again)) == 0


def test_a_killed_check_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        put(tmp_path / "pictures", f"{i:02}.png", (100 + i, 50, 9))
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "fakes")!r}]
from pathlib import Path
from apl_train.folder_score import face_cache
from apl_train.commands.cli import main
from apl_train.datasets.pictures import PictureFolder
from colour_faces import ColourFaces
face_cache.PART = 4
class Killed(ColourFaces):
    def faces(self, image):
        if self.looked == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().faces(image)
store, embedder = PictureFolder({str(tmp_path / "pictures")!r}), Killed()
cache = face_cache.FaceCache(Path({str(tmp_path / "kept")!r}), embedder)
face_cache.look(store, sorted(store.names()), embedder, cache)
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    monkeypatch.setattr(face_cache, "PART", 4)
    store, embedder, told = PictureFolder(tmp_path / "pictures"), ColourFaces(), []
    cache = FaceCache(tmp_path / "kept", embedder)
    assert len(cache) == 12  # three whole parts; nothing of the fourth
    seen = look(store, sorted(store.names()), embedder, cache, progress=lambda *step: told.append(step))
    assert embedder.looked == 8 and len(seen) == 20
    assert told[0] == ("faces", 0, 20) and told[-1] == ("faces", 20, 20)
    plain = look(store, sorted(store.names()), ColourFaces(), FaceCache(None, embedder))
    assert all((seen[n].faces[0].embedding == plain[n].faces[0].embedding).all() for n in seen)


# --- the command ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "said"), [
    (["--references", "x"], "--references is given without --images"),
    (["--second", "sface"], "--second is given without --images"),
    (["--images", "."], "--images is given without --references"),
    (["--images", ".", "--references", ".", "--prefix", "p"], "--prefix and --images"),
    (["--images", "nowhere", "--references", "."], "no folder"),
])
def test_the_command_says_what_does_not_go_together(words: list[str], said: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *words]) in (2, 5)
    assert said in capsys.readouterr().err


def test_a_missing_recogniser_says_licence_and_command(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("insightface")
    assert main(["score", "--images", str(folders / "off"), "--references", str(folders / "refs"), "--recogniser",
                 "auraface", "--root", str(folders / "none")]) == 7
    said = capsys.readouterr().err
    assert "hf download fal/AuraFace-v1" in said and "Apache-2.0" in said
