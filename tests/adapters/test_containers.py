"""A system container from image to unit: /exports, substitution, values, runtime, tmpfiles."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from firstboot import containers
from firstboot.containers import ContainerError, bundle, runtime, tools, variables
from firstboot.containers.exports import render
from tests.adapters.oci_images import (
    MANIFEST,
    PLAIN,
    UNIT,
    Layout,
    Program,
    assert_nothing_installed,
    bind,
    build,
    config,
    install,
    need_tools,
    slot,
    tmpfiles,
    unit,
)


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    need_tools()


# ---------------------------------------------------------------- what /exports may hold


def test_config_json_is_copied_as_it_is_and_wins_over_the_template(
    root: Path, tmp_path: Path
) -> None:
    verbatim = '{"root": {"readonly": true, "path": "rootfs"}, "hostname": "$NAME $"}'
    image = build(tmp_path / "image", {**PLAIN, "exports/config.json": verbatim})
    install(root, image)
    assert (slot(root) / "config.json").read_text() == verbatim


def test_a_later_layer_overrides_a_template(root: Path, tmp_path: Path) -> None:
    child = {"exports/service.template": UNIT + "# child\n"}
    install(root, build(tmp_path / "image", PLAIN, child))
    assert unit(root).endswith("# child\n")


def test_a_whiteout_removes_a_template(root: Path, tmp_path: Path) -> None:
    child = {"exports/.wh.service.template": ""}
    install(root, build(tmp_path / "image", PLAIN, child))
    assert "PIDFile=" in unit(root), "the built-in unit"


def test_an_image_without_exports_gets_defaults(root: Path, tmp_path: Path) -> None:
    install(root, build(tmp_path / "image", {"usr/bin/run.sh": Program("#!/bin/sh\n")}))
    runc = shutil.which("runc", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert unit(root) == (
        "[Unit]\nDescription=web\n\n[Service]\nExecStartPre=\n"
        f"ExecStart={runc}  --systemd-cgroup run -d --pid-file /run/container-web.pid 'web'\n"
        f"ExecStop=\nExecStopPost={runc} delete 'web'\nRestart=on-failure\n"
        "WorkingDirectory=/var/lib/containers/atomic/web.0\nPIDFile=/run/container-web.pid\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )
    made = config(root)
    assert made["root"] == {"path": "rootfs", "readonly": True}
    assert (made["process"]["args"], made["process"]["terminal"]) == (["run.sh"], False)
    assert "mounts" in made, "the rest is what the runtime proposes"


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "[]",
        {"defaultValues": ["A"]},
        {"defaultValues": {"A": ["b"]}},
        {"renameFiles": "x"},
        {"installedFilesTemplate": {"a": "b"}},
        {"useLinks": "yes"},
        {"noContainerService": 1},
    ],
    ids=str,
)
def test_an_unusable_manifest_names_the_image(root: Path, tmp_path: Path, manifest: Any) -> None:
    image = build(tmp_path / "image", {**PLAIN, "exports/manifest.json": manifest})
    with pytest.raises(ContainerError, match=f"Invalid manifest.json file in image: {image}"):
        install(root, image)
    assert_nothing_installed(root)


def test_unknown_manifest_keys_are_ignored(root: Path, tmp_path: Path) -> None:
    manifest = {**MANIFEST, "somethingNew": {"a": [1]}}
    install(root, build(tmp_path / "image", {**PLAIN, "exports/manifest.json": manifest}))
    assert config(root)["process"]["args"] == ["run.sh", "hello"]


# ---------------------------------------------------------------- substitution


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("$NAME", "web"),
        ("${NAME}X", "webX"),
        ("$NAME-1 $NAME.etcd", "web-1 web.etcd"),
        ("$$MAINPID", "$MAINPID"),
        ("$$$NAME", "$web"),
        ("$ONCE", "$NAME"),
        ('["a" $MORE]', '["a" ,"b"]'),
        ("no variable", "no variable"),
        ("", ""),
    ],
)
def test_substitution(text: str, becomes: str) -> None:
    values = {"NAME": "web", "ONCE": "$NAME", "MORE": ',"b"'}
    assert render(Path("t"), text, values) == becomes


@pytest.mark.parametrize("text", ["$NAMEX", "$name", "${MISSING}"])
def test_an_unknown_variable(text: str) -> None:
    variable = text.strip("${}")
    expected = f"The template file '/t' still contains an unreplaced value for: ''{variable}''"
    with pytest.raises(ContainerError, match=re.escape(expected)):
        render(Path("/t"), text, {"NAME": "web"})


@pytest.mark.parametrize("text", ["$1", "a $ b", "$", "${A:-b}", "${a-b}", "${A"])
def test_an_invalid_placeholder(text: str) -> None:
    with pytest.raises(ContainerError, match=r"'/t'.*Invalid placeholder in string: line 2, col"):
        render(Path("/t"), "line\n" + text, {"A": "", "a": ""})


def test_a_missing_value_stops_the_installation(root: Path, tmp_path: Path) -> None:
    image = build(tmp_path / "image", {**PLAIN, "exports/service.template": "$NOBODY_SETS_THIS"})
    with pytest.raises(ContainerError, match="unreplaced value for: ''NOBODY_SETS_THIS''"):
        install(root, image)
    assert_nothing_installed(root)


def test_a_list_is_extended_by_a_value_that_begins_with_a_comma(root: Path, plain: str) -> None:
    mount = {"type": "bind", "source": "/sys", "destination": "/sys"}
    install(root, plain, ADDTL_MOUNTS="," + json.dumps(mount))
    assert config(root)["mounts"][1] == mount


def test_a_template_that_is_not_text(root: Path, tmp_path: Path) -> None:
    made = Layout(tmp_path / "image")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        entry = tarfile.TarInfo("exports/service.template")
        entry.size = 2
        tar.addfile(entry, io.BytesIO(b"\xff\xfe"))
    raw = packed.getvalue()
    diff = hashlib.sha256(gzip.decompress(raw)).hexdigest()
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{diff}"]}
    document = {
        "schemaVersion": 2,
        "config": made.blob(
            {"architecture": "amd64", "os": "linux", "rootfs": rootfs}, "config.v1+json"
        ),
        "layers": [made.blob(raw, "layer.v1.tar+gzip")],
    }
    made.add(made.blob(document, "manifest.v1+json"))
    with pytest.raises(ContainerError, match=r"service\.template' is not UTF-8"):
        install(root, f"oci:{made.path}")


# ---------------------------------------------------------------- values


def resolved(given: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    forced = {"NAME": "web", "DESTDIR": "/d", "IMAGE_NAME": "i", "IMAGE_ID": "0"}
    return variables.resolve(given, defaults, forced, "/usr/bin/runc")


OVERRIDABLE = {
    "RUN_DIRECTORY": "/run",
    "PIDFILE": "/run/container-web.pid",
    "CONF_DIRECTORY": "/etc",
    "STATE_DIRECTORY": "/var/lib",
    "RUNTIME": "/usr/bin/runc",
}


@pytest.mark.parametrize(("name", "value"), OVERRIDABLE.items())
def test_what_the_host_sets_beats_the_manifest_but_not_the_operator(name: str, value: str) -> None:
    assert resolved({}, {})[name] == value
    assert resolved({}, {name: "manifest"})[name] == value
    assert resolved({name: "given"}, {name: "manifest"})[name] == "given"


@pytest.mark.parametrize("name", ["ALL_PROCESS_CAPABILITIES", "ATOMIC"])
def test_what_only_the_host_knows_can_be_overridden_too(name: str) -> None:
    assert resolved({}, {name: "manifest"})[name] != "manifest"
    assert resolved({name: "given"}, {})[name] == "given"


def test_the_manifest_is_for_what_nobody_else_sets() -> None:
    assert resolved({}, {"X": "manifest"})["X"] == "manifest"
    assert resolved({"X": "given"}, {"X": "manifest"})["X"] == "given"
    assert resolved({}, {"UUID": "manifest"})["UUID"] == "manifest"
    assert re.fullmatch(r"[0-9a-f-]{36}", resolved({}, {})["UUID"])
    assert resolved({"RUN_DIRECTORY": "/r"}, {})["PIDFILE"] == "/r/container-web.pid"


def test_some_values_are_not_up_to_the_operator(root: Path, plain: str) -> None:
    given = dict.fromkeys(sorted(variables.FORCED), "mine")
    done = install(root, plain, **given)
    values = done.container.values
    assert "mine" not in {values[name] for name in variables.FORCED}
    assert values["NAME"] == "web"
    assert values["DESTDIR"] == "/var/lib/containers/atomic/web.0"
    assert (values["HOST_UID"], values["HOST_GID"]) == (str(os.getuid()), str(os.getgid()))
    assert values["IMAGE_NAME"] == plain
    index = json.loads(Path(plain.removeprefix("oci:"), "index.json").read_text())
    assert values["IMAGE_ID"] == index["manifests"][0]["digest"].removeprefix("sha256:")
    assert not install(root, plain, **given).changed, "what is not up to them changes nothing"


def test_all_capabilities_are_those_a_container_can_get_here() -> None:
    listed = json.loads(f"[{variables.capability_list()}]")
    status = Path("/proc/1/status").read_text()
    found = re.search(r"CapBnd:\s*(\w+)", status)
    assert found is not None
    assert len(listed) == int(found.group(1), 16).bit_count()
    assert "CAP_CHOWN" in listed


def test_capabilities_nobody_has_are_not_asked_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime would fail on them, and images list all there are; the rest stays as written."""
    asked = {"bounding": ["CAP_CHOWN", "CAP_SYS_RESOURCE"], "effective": ["CAP_SYS_RESOURCE"]}
    document = {"root": {"readonly": True, "path": "rootfs"}, "process": {"capabilities": asked}}
    image = with_config(tmp_path / "image", document)
    monkeypatch.setattr(bundle, "possible_capabilities", lambda: ("CAP_CHOWN",))
    install(root, image)
    kept = {"bounding": ["CAP_CHOWN"], "effective": []}
    assert config(root) == document | {"process": {"capabilities": kept}}


# ---------------------------------------------------------------- the runtime


RUNC = runtime.Runtime("/usr/bin/runc", pid_file=True, systemd_cgroup=True)


def test_exec_strings_of_a_container_with_a_pid_file() -> None:
    assert runtime.exec_values(RUNC, "web", "/run/web.pid", cgroupfs=False) == {
        "EXEC_START": "/usr/bin/runc  --systemd-cgroup run -d --pid-file /run/web.pid 'web'",
        "EXEC_STOP": "",
        "EXEC_STARTPRE": "",
        "EXEC_STOPPOST": "/usr/bin/runc delete 'web'",
    }


def test_exec_strings_of_a_container_in_the_foreground() -> None:
    assert runtime.exec_values(RUNC, "web", None, cgroupfs=False) == {
        "EXEC_START": "/usr/bin/runc --systemd-cgroup run 'web'",
        "EXEC_STOP": "/usr/bin/runc --systemd-cgroup kill 'web'",
        "EXEC_STARTPRE": "",
        "EXEC_STOPPOST": "",
    }


@pytest.mark.parametrize(
    ("template", "detached"),
    [
        ("$EXEC_STOPPOST $PIDFILE", True),
        ("$EXEC_STOPPOST ${PIDFILE}", False),
        ("${EXEC_STOPPOST} $PIDFILE", False),
        ("$PIDFILE", False),
    ],
)
def test_a_unit_asks_for_a_pid_file_by_naming_both_variables(
    root: Path, tmp_path: Path, template: str, detached: bool
) -> None:
    files = {**PLAIN, "exports/service.template": f"# $EXEC_START\n# {template}\n"}
    install(root, build(tmp_path / "image", files))
    assert ("run -d --pid-file" in unit(root)) is detached


@pytest.mark.parametrize(
    ("path", "flag"),
    [("/system.slice/web.service/payload", False), ("system.slice:sc:web", True), (None, True)],
)
def test_a_cgroup_named_by_path_is_not_for_systemd(
    root: Path, tmp_path: Path, path: str | None, flag: bool
) -> None:
    document = {"root": {"path": "rootfs", "readonly": True}, "linux": {"cgroupsPath": path}}
    files = {**PLAIN, "exports/config.json.template": document}
    install(root, build(tmp_path / "image", files))
    assert ("--systemd-cgroup run" in unit(root)) is flag


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_both_runtimes_offer_pid_files_and_systemd_cgroups(name: str) -> None:
    found = runtime.probe(runtime.choose(name))
    assert found.path.endswith(f"/{name}")
    assert found.pid_file
    assert found.systemd_cgroup is (os.geteuid() == 0)


def test_a_runtime_that_can_do_less(root: Path, tmp_path: Path) -> None:
    """Without --pid-file and --systemd-cgroup it runs in the foreground, in systemd's cgroup."""
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\n")
    old.chmod(0o755)
    containers.install(root, "web", build(tmp_path / "image", {"x": ""}), {}, str(old))
    assert f"ExecStart={old} run 'web'\nExecStop={old} kill 'web'\n" in unit(root)


def test_the_runtime_asked_for_is_used_and_kept(root: Path, plain: str) -> None:
    first = containers.install(root, "web", plain, {}, "crun")
    assert first.container.runtime.endswith("/crun")
    assert f"ExecStart={first.container.runtime} " in unit(root)
    again = install(root, plain, GREETING="other")
    assert again.container.runtime == first.container.runtime
    changed = containers.install(root, "web", plain, {}, "runc")
    assert changed.changed
    assert changed.container.values["RUNTIME"] == changed.container.runtime
    assert changed.container.runtime.endswith("/runc")


def test_crun_where_there_is_no_runc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crun = shutil.which("crun")
    assert crun is not None
    (tmp_path / "crun").symlink_to(crun)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "SBIN", "")
    assert runtime.choose() == str(tmp_path / "crun")


def test_a_runtime_that_is_not_there(root: Path, plain: str) -> None:
    expected = "Cannot install the container: the runtime /usr/bin/nothing is not installed"
    with pytest.raises(ContainerError, match=f"^{expected}$"):
        containers.install(root, "web", plain, {}, "/usr/bin/nothing")
    assert_nothing_installed(root)


# ---------------------------------------------------------------- what is refused


def with_config(path: Path, document: Any) -> str:
    return build(path, {**PLAIN, "exports/config.json.template": document})


@pytest.mark.parametrize("readonly", [False, None, "true", 1])
def test_a_writable_root_is_refused(root: Path, tmp_path: Path, readonly: object) -> None:
    image = with_config(tmp_path / "image", {"root": {"path": "rootfs", "readonly": readonly}})
    with pytest.raises(ContainerError, match=r"^Only readonly images are supported$"):
        install(root, image)
    assert_nothing_installed(root)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"root": {"path": "/", "readonly": True}}, "must be 'rootfs', not '/'"),
        ({"root": "rootfs"}, "Only readonly images"),
        ('{"root": {"readonly": true', "not JSON: .* line 1"),
        ('["$GREETING"]', "not a mapping"),
        ({"root": {"path": "rootfs", "readonly": True}, "mounts": {}}, None),
        ({"root": {"path": "rootfs", "readonly": True}, "mounts": ["x"]}, "mounts"),
    ],
)
def test_an_unusable_config_is_refused(
    root: Path, tmp_path: Path, document: Any, message: str | None
) -> None:
    image = with_config(tmp_path / "image", document)
    if message is None:
        install(root, image)
        return
    with pytest.raises(ContainerError, match=message):
        install(root, image)
    assert_nothing_installed(root)


def test_a_quote_in_a_value_is_the_callers_part(root: Path, plain: str) -> None:
    with pytest.raises(ContainerError, match=r"config\.json of web is not JSON"):
        install(root, plain, GREETING='"')


def test_an_empty_config_is_not_looked_at(root: Path, tmp_path: Path) -> None:
    install(root, with_config(tmp_path / "image", {}))
    assert config(root) == {}


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "-flag", "a b", "x" * 300])
def test_names_that_cannot_be_containers(root: Path, plain: str, name: str) -> None:
    with pytest.raises(ContainerError, match="cannot be the name of a system container"):
        containers.install(root, name, plain, {})


# ---------------------------------------------------------------- tmpfiles


def test_missing_bind_sources_are_created(root: Path, plain: str) -> None:
    (root / "srv").mkdir()
    (root / "proc").mkdir()
    done = install(root, plain, ADDTL_MOUNTS=bind("/srv", "/var/lib/data", "/run/web"))
    owner = f"{os.getuid()} {os.getgid()}"
    assert tmpfiles(root) == (
        f"d    /var/lib/data   0700 {owner} - -\nd    /run/web   0700 {owner} - -\n"
    )
    assert done.container.tmpfiles == "/etc/tmpfiles.d/web.conf"
    assert (root / "var/lib/data").stat().st_mode & 0o777 == 0o700
    assert (slot(root) / "tmpfiles-web.conf").read_text() == tmpfiles(root)


def test_a_replacement_still_creates_what_vanishes_at_boot(root: Path, plain: str) -> None:
    (root / "proc").mkdir()
    install(root, plain, ADDTL_MOUNTS=bind("/run/web", "/run/old"))
    install(root, plain, ADDTL_MOUNTS=bind("/run/web"))
    assert "/run/web " in tmpfiles(root)
    assert "/run/old" not in tmpfiles(root)


def test_a_template_for_tmpfiles_is_used_alone(root: Path, tmp_path: Path) -> None:
    files = {**PLAIN, "exports/tmpfiles.template": "d ${STATE_DIRECTORY}/$NAME 0750 - - - -\n"}
    install(root, build(tmp_path / "image", files), ADDTL_MOUNTS=bind("/run/web"))
    assert tmpfiles(root) == "d /var/lib/web 0750 - - - -\n"
    assert (root / "var/lib/web").stat().st_mode & 0o777 == 0o750


def test_tmpfiles_that_are_no_longer_wanted_go(root: Path, plain: str, tmp_path: Path) -> None:
    (root / "proc").mkdir()
    lines = {**PLAIN, "exports/tmpfiles.template": "d /var/lib/x\n"}
    install(root, build(tmp_path / "image", lines))
    assert install(root, plain).container.tmpfiles == ""
    assert not (root / "etc/tmpfiles.d/web.conf").exists()


def test_wrong_tmpfiles_fail_and_leave_nothing(root: Path, tmp_path: Path) -> None:
    files = {**PLAIN, "exports/tmpfiles.template": "q? nonsense\n"}
    with pytest.raises(ContainerError, match="systemd-tmpfiles failed: "):
        install(root, build(tmp_path / "image", files))
    assert containers.installed(root) == ()
    assert not list((root / "etc").rglob("*.*"))
