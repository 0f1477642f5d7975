"""One file of a bundle and back: the same bytes, or a refusal that leaves nothing."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.bundles import pack as pack_module
from engines.bundles.build import build_bundle
from engines.bundles.bundle import open_bundle
from engines.bundles.golden import refuse_disagreement, replay
from engines.bundles.manifest import MANIFEST_FILE, Manifest, digest_of, manifest_of
from engines.bundles.pack import pack_bundle, unpack_bundle
from graphs.errors import BadArtefact, OperationFailed, UsageError
from graphs.spec import SPEC_FILE, spec_from_folder
from tests.conftest import Outcome
from tests.engines.bundle.conftest import edit_manifest
from tests.engines.bundle.test_open_bundle import flip
from tests.hand_made import WEIGHTS

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="session")
def packed(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "pair.saccade"
    pack_bundle(pair, file)
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def members_of(file: Path) -> Members:
    with tarfile.open(file, "r:") as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def write(file: Path, members: Members) -> Path:
    with tarfile.open(file, "w:", format=tarfile.PAX_FORMAT) as tar:
        for header, content in members:
            header.size = len(content) if header.type == tarfile.REGTYPE else 0
            tar.addfile(header, io.BytesIO(content))
    return file


def refused(file: Path, says: str) -> None:
    """It is refused in these words, and neither the folder nor a part of it is left."""
    out = file.parent / "out"
    with pytest.raises(BadArtefact) as e:
        unpack_bundle(file, out)
    assert re.search(says, str(e.value).replace(str(file), "FILE"))
    assert not out.exists()
    assert not list(file.parent.glob(".*partial*"))


def test_there_and_back(pair: Path, packed: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome]) -> None:
    told = saccade_cli("unpack", packed, "-o", tmp_path / "b", "--json")
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    assert document["schema"] == "saccade.unpacked/1"
    assert document["files"] == len(files_of(pair)) - 1
    assert "unpacking" in told.stderr
    assert files_of(tmp_path / "b") == files_of(pair)
    assert open_bundle(tmp_path / "b").threshold == 0.9
    told = saccade_cli("pack", tmp_path / "b", "-o", tmp_path / "again")
    assert (told.code, told.stdout) == (0, f"{tmp_path / 'again'}\n")
    assert (tmp_path / "again").read_bytes() == packed.read_bytes(), "a bundle is one sequence of bytes"


def test_weights_that_an_export_left_in_its_checkpoint_travel(exports: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(exports["alone"], tmp_path / "checkpoint"))
    (checkpoint / "training_args.bin").write_bytes(b"what else lies there")
    spec = spec_from_folder(checkpoint).model_copy(update={"weights_are": "in-place"})
    (checkpoint / SPEC_FILE).write_text(spec.dumps())
    build_bundle([checkpoint], tmp_path / "b")
    pack_bundle(tmp_path / "b", tmp_path / "packed")
    weights = (checkpoint / WEIGHTS).read_bytes()
    shutil.rmtree(checkpoint)
    shutil.rmtree(tmp_path / "b")
    unpack_bundle(tmp_path / "packed", tmp_path / "there")
    opened = open_bundle(tmp_path / "there").members["alone"]
    refuse_disagreement(replay(opened.folder, opened.spec), "unpacked")
    assert (opened.folder / WEIGHTS).read_bytes() == weights
    assert not list((tmp_path / "there").rglob("training_args.bin"))


def test_any_tar_reads_it_and_the_manifest_comes_first(packed: Path, pair: Path) -> None:
    members = members_of(packed)
    assert members[0][0].name == MANIFEST_FILE
    assert {m.name: content for m, content in members} == files_of(pair)
    assert {(m.uid, m.gid, m.mtime, m.uname) for m, _ in members} == {(0, 0, 0, "")}


def test_a_changed_bundle_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    flip(bundle / "large" / WEIGHTS)
    with pytest.raises(BadArtefact, match=r"large/model\.safetensors was changed after the build"):
        pack_bundle(bundle, tmp_path / "f")
    (bundle / "large" / WEIGHTS).unlink()
    (bundle / "large" / WEIGHTS).symlink_to(bundle / "small" / WEIGHTS)
    with pytest.raises(BadArtefact, match="is a symbolic link"):
        pack_bundle(bundle, tmp_path / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["pair.bundle"]


def member_missing(document: dict[str, Any]) -> None:
    document["members"].pop("small")


def member_elsewhere(document: dict[str, Any]) -> None:
    document["members"]["small"]["folder"] = "../elsewhere"


@pytest.mark.parametrize(
    ("change", "says"), [(member_missing, "holds large, not a pair"), (member_elsewhere, "outside")]
)
def test_a_bundle_that_no_verb_opens_is_not_packed(
    bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(BadArtefact, match=says):
        pack_bundle(bundle, tmp_path / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["pair.bundle"]


def test_a_file_that_changes_while_it_is_packed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in (lambda content: content[:-3], lambda content: content + b"x"):
        path = bundle / "small" / WEIGHTS
        whole = path.read_bytes()

        def checked(bundle: Path, p: Path = path, content: bytes = change(whole), **_: object) -> Manifest:
            p.write_bytes(content)
            return manifest_of(bundle)

        monkeypatch.setattr(pack_module, "checked_manifest", checked)
        with pytest.raises(BadArtefact, match=r"small/model\.safetensors was changed"):
            pack_bundle(bundle, tmp_path / "f")
        path.write_bytes(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["pair.bundle"]


def test_existing_places_are_kept(packed: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("years of work")
    with pytest.raises(UsageError, match="--overwrite"):
        pack_bundle(bundle, tmp_path / "f")
    pack_bundle(bundle, tmp_path / "f", overwrite=True)
    assert (tmp_path / "f").read_bytes() == packed.read_bytes()
    with pytest.raises(UsageError, match="lies in the bundle"):
        pack_bundle(bundle, bundle / "f")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    for overwrite, says in ((False, "--overwrite"), (True, "saccade did not write it")):
        with pytest.raises(UsageError, match=says):
            unpack_bundle(packed, tmp_path / "thesis", overwrite=overwrite)
    flip(bundle / "small" / WEIGHTS)
    unpack_bundle(packed, bundle, overwrite=True)
    assert open_bundle(bundle)


def test_a_packed_file_in_the_old_bundle_is_left_alone(packed: Path, bundle: Path) -> None:
    file = Path(shutil.copyfile(packed, bundle / "ok.sac"))
    with pytest.raises(UsageError, match=r"holds the file .*ok\.sac itself, which would be replaced"):
        unpack_bundle(file, bundle, overwrite=True)
    assert file.read_bytes() == packed.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file(packed: Path, tmp_path: Path, share: float) -> None:
    whole = packed.read_bytes()
    (tmp_path / "f").write_bytes(whole[: int(share * len(whole))])
    refused(tmp_path / "f", "truncated|does not begin with")


def test_truncated_between_two_members(packed: Path, tmp_path: Path) -> None:
    with tarfile.open(packed, "r:") as tar:
        members = tar.getmembers()
    end_of_last = members[-1].offset_data + -(-members[-1].size // 512) * 512
    for at in (members[5].offset, members[5].offset + 512, end_of_last, end_of_last + 512):
        (tmp_path / "f").write_bytes(packed.read_bytes()[:at])
        refused(tmp_path / "f", "truncated")
    (tmp_path / "f").write_bytes(packed.read_bytes() + b"more")
    refused(tmp_path / "f", "continues after its end")


def test_no_packed_bundle(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\x89PNG" + bytes(range(256)) * 8)
    refused(tmp_path / "f", "is not a packed bundle")
    refused(tmp_path / "nowhere", "is missing; give the file that saccade pack wrote")
    refused(tmp_path, "cannot be read")
    write(tmp_path / "f", [(tarfile.TarInfo("README"), b"hello")])
    refused(tmp_path / "f", "does not begin with manifest.json")


def test_every_file_is_compared_with_its_digest(packed: Path, tmp_path: Path) -> None:
    with tarfile.open(packed, "r:") as tar:
        members = tar.getmembers()
    for member in (members[1], next(m for m in members if m.name.endswith(WEIGHTS))):
        (tmp_path / "f").write_bytes(packed.read_bytes())
        flip(tmp_path / "f", member.offset_data + member.size // 2)
        refused(tmp_path / "f", f"{member.name} was changed")
    (tmp_path / "f").write_bytes(packed.read_bytes())
    flip(tmp_path / "f", packed.read_bytes().index(b'"threshold": 0.9') + 15)
    refused(tmp_path / "f", "manifest.json was changed")


def escape_by(name: str) -> Callable[[Members], None]:
    """A file of the manifest under another name, manifest and archive agreeing."""

    def change(members: Members) -> None:
        old, members[2][0].name = members[2][0].name, name
        relist(members, lambda files: next(f for f in files if f["path"] == old).update(path=name))

    return change


def relist(members: Members, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the manifest's files and sign it, as someone would who knows how."""
    document = json.loads(members[0][1])
    change(document["files"])
    document["sha256"] = digest_of(document)
    members[0] = members[0][0], json.dumps(document).encode()


def link(kind: bytes) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[2][0].type, members[2][0].linkname = kind, "/etc/passwd"

    return change


def listed_twice(members: Members) -> None:
    members.append(members[3])
    relist(members, lambda files: files.append(files[2]))


def one_in_the_others_way(members: Members) -> None:
    below = f"{members[2][0].name}/deeper"
    relist(members, lambda files: files.append({**files[1], "path": below}))
    header = tarfile.TarInfo(below)
    members.insert(3, (header, members[2][1]))


HOSTILE: dict[str, tuple[Callable[[Members], object], str]] = {
    "traversal": (escape_by("../evil"), "leaves the folder"),
    "traversal within": (escape_by("small/../../evil"), "leaves the folder"),
    "absolute": (escape_by("/evil"), "leaves the folder"),
    "backslash": (escape_by("..\\evil"), "leaves the folder"),
    "symbolic link": (link(tarfile.SYMTYPE), "is a link"),
    "hard link": (link(tarfile.LNKTYPE), "is a link"),
    "device": (link(tarfile.CHRTYPE), "is a link or another special entry"),
    "folder": (link(tarfile.DIRTYPE), "is a link or another special entry"),
    "twice": (lambda members: members.append(members[3]), "is in it twice"),
    "second manifest": (lambda members: members.append(members[0]), "is in it twice"),
    "listed twice": (listed_twice, "lists a file twice"),
    "in the way": (one_in_the_others_way, "at one place"),
    "stranger": (lambda members: members.append((tarfile.TarInfo("small/x.so"), b"x")), "is not in its manifest"),
    "left out": (lambda members: members.pop(), "is missing"),
    "another size": (lambda members: members.__setitem__(2, (members[2][0], b"x")), "has 1 bytes, its manifest says"),
    "manifest not first": (lambda members: members.reverse(), "does not begin with"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file(packed: Path, tmp_path: Path, what: str) -> None:
    change, says = HOSTILE[what]
    members = members_of(packed)
    change(members)
    refused(write(tmp_path / "f", members), says)
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    "header",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "x"},
        {"GNU.sparse.map": "0,x"},
        {"GNU.sparse.size": "x"},
        {"size": "x"},
        {"size": "-5"},
        {"path": "a\0b"},
    ],
)
def test_an_extended_header_that_says_nonsense(packed: Path, tmp_path: Path, header: dict[str, str]) -> None:
    members = members_of(packed)
    members[2][0].pax_headers = header
    refused(write(tmp_path / "f", members), "FILE")
    members[0][0].pax_headers = header
    refused(write(tmp_path / "f", members), "FILE")


def test_a_name_that_is_too_long(packed: Path, tmp_path: Path) -> None:
    for name in ("x" * 300, "/".join(["x" * 250] * 17)):
        members = members_of(packed)
        escape_by(name)(members)
        refused(write(tmp_path / "f", members), "FILE")


def test_a_full_disk(packed: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack_module, "_new", full)
    with pytest.raises(OperationFailed, match="disk is full"):
        unpack_bundle(packed, tmp_path / "b")
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OperationFailed, match="disk is full"):
        pack_bundle(pair, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
