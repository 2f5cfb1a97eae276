"""The contract of Atomic's system containers, row by row, each with the test that holds it.

The tests are named ``file::function``, without ``tests/`` and ``test_containers``: ``_store::x`` is
``tests/adapters/test_containers_store.py``. A row without a test, or a test that is gone, fails.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# fmt: off
# ruff: noqa: E501
ROWS = {
    # labels
    "label atomic.run=once: run to its end, nothing stays": "_verbs::test_run_once",
    "label atomic.type=system: recommended": "_lint::test_each_rule_finds_what_it_is_for",
    "labels atomic.summary .version .license .url .description": "_packages::test_a_whole_container_as_a_package",
    "label atomic.requires": "_packages::test_a_package_that_cannot_be_leaves_nothing",
    # /exports
    "config.json: copied as it is, wins": "::test_config_json_is_copied_as_it_is_and_wins_over_the_template",
    "config.json.template: rendered": "::test_substitution",
    "no config.json: default": "::test_an_image_without_exports_gets_defaults",
    "no config.json, runtime cannot: {}": "_settings::test_a_runtime_without_a_proposal_makes_an_empty_config",
    "service.template: rendered, else the default unit": "::test_a_whiteout_removes_a_template",
    "tmpfiles.template: used alone": "::test_a_template_for_tmpfiles_is_used_alone",
    "no tmpfiles.template: missing bind sources": "::test_missing_bind_sources_are_created",
    "manifest.json: unknown keys": "::test_unknown_manifest_keys_are_ignored",
    "manifest.json: unusable, names the image": "::test_an_unusable_manifest_names_the_image",
    "manifest.json: noContainerService": "_verbs::test_a_container_that_only_brings_files",
    "manifest.json: useLinks": "_store::test_files_below_usr_share_the_deployments_inode_unless_told_otherwise",
    "no /exports: told": "_verbs::test_an_image_without_exports_is_told_of",
    "rpm.spec, rpm.spec.template, container.rpm": "_packages::test_the_images_own_specification",
    "layers overlay, plain store": "::test_a_later_layer_overrides_a_template",
    "layers overlay, ostree": "_ostree::test_layers_lie_over_one_another",
    # substitution
    "$NAME ${NAME} $$, once": "::test_substitution",
    "unknown name": "::test_an_unknown_variable",
    "$ that begins nothing": "::test_an_invalid_placeholder",
    "list splice": "::test_a_list_is_extended_by_a_value_that_begins_with_a_comma",
    "no escaping": "::test_a_quote_in_a_value_is_the_callers_part",
    # values
    "--set K=V at the first =": "_verbs::test_install_says_what_it_made",
    "--set without =": "_verbs::test_wrong_usage",
    "host over manifest, given over host": "::test_what_the_host_sets_beats_the_manifest_but_not_the_operator",
    "capabilities, ATOMIC": "::test_what_only_the_host_knows_can_be_overridden_too",
    "capabilities: what can be had": "::test_all_capabilities_are_those_a_container_can_get_here",
    "manifest defaults, UUID": "::test_the_manifest_is_for_what_nobody_else_sets",
    "forced values": "::test_some_values_are_not_up_to_the_operator",
    "UUID kept over updates": "_verbs::test_update",
    # runtime
    "which runtime": "_settings::test_which_runtime_is_stronger",
    "runtime not there": "::test_a_runtime_that_is_not_there",
    "feature probe": "::test_both_runtimes_offer_pid_files_and_systemd_cgroups",
    "feature probe: less": "::test_a_runtime_that_can_do_less",
    "pid-file mode asked for by the unit": "::test_a_unit_asks_for_a_pid_file_by_naming_both_variables",
    "exec strings, pid-file": "::test_exec_strings_of_a_container_with_a_pid_file",
    "exec strings, plain": "::test_exec_strings_of_a_container_in_the_foreground",
    "both modes, both runtimes, for real": "machines/test_containers.py::test_both_runtimes_in_both_modes",
    "Type=notify, both runtimes": "machines/test_containers.py::test_a_payload_that_dies_before_it_is_ready",
    # validation
    "root.readonly": "::test_a_writable_root_is_refused",
    "root.path, JSON": "::test_an_unusable_config_is_refused",
    "{} skips": "::test_an_empty_config_is_not_looked_at",
    # storage
    "links, slots, copies": "_store::test_where_everything_goes",
    "checkout_path": "_settings::test_containers_lie_where_the_operator_wants_them",
    "a name may end in .0": "_store::test_a_name_may_look_like_a_deployment",
    "dot names are skipped": "_store::test_the_list_holds_containers_only",
    "/usr/lib/containers/atomic": "_store::test_what_came_with_the_host_is_listed_but_never_changed",
    "atomic.conf": "_settings::test_what_is_read_of_the_file",
    "ATOMIC_OSTREE_*": "_settings::test_the_environment_is_stronger",
    "proxies, registry_confdir": "_settings::test_proxies_and_signature_rules_reach_skopeo",
    "info": "_store::test_the_info_file_is_what_atomics_tools_read",
    "info of older tools": "_store::test_an_info_file_of_older_tools_is_read",
    "ostree: configured": "_ostree::test_the_configured_repository_is_used",
    "ostree: same file system": "_ostree::test_a_repository_on_another_file_system",
    "ostree: /var is a mount": "_ostree::test_var_may_be_another_mount_of_the_repositorys_file_system",
    "ostree: .storage/ostree": "_ostree::test_atomics_private_repository_is_used_where_it_is",
    "ostree: branch names": "_ostree::test_how_a_name_becomes_a_branch",
    "ostree: metadata": "_ostree::test_branches_and_metadata_are_those_that_atomic_reads",
    "ostree: no devices": "_ostree::test_owners_attributes_and_odd_files",
    "ostree: SELinux labels": "_labels::test_layers_are_labelled_as_the_policy_says",
    "ostree: hard links": "_ostree::test_a_checkout_shares_its_files_with_the_repository",
    "ostree: layer lists": "_ostree::test_an_image_that_others_imported_is_used_without_its_registry",
    "ostree: IMAGE_ID": "_ostree::test_the_id_of_an_image_without_a_digest",
    "layer not found": "_ostree::test_a_missing_layer_in_the_repository",
    # sources
    "registries": "_images::test_a_registrys_image_is_pulled_once",
    "pull fetches anew": "_images::test_a_pull_fetches_anew_and_an_update_takes_it",
    "unqualified name": "_images::test_a_name_without_a_registry_is_told_of",
    "--src-creds": "_images::test_a_password_may_be_in_a_file_or_given",
    "docker:": "_images::test_an_image_of_the_docker_daemon",
    "dockertar:": "_images::test_what_docker_save_wrote",
    "oci:/": "_images::test_a_layout_is_read_where_it_is",
    "default name": "_verbs::test_the_name_is_the_images_unless_given",
    # host files
    "renamed, rendered, recorded": "_store::test_host_files_are_copied_renamed_rendered_and_recorded",
    "a link's checksum": "_store::test_a_link_to_a_host_file_has_that_files_checksum",
    "never over a file": "_store::test_a_host_file_is_never_overwritten",
    "changed files stay": "_store::test_uninstall_leaves_what_is_not_ours",
    "hard link only if the label is equal": "_labels::test_a_file_whose_label_is_another_is_copied",
    "--system-package=no": "_verbs::test_host_files_come_without_a_package",
    "--system-package=auto": "_packages::test_what_auto_comes_to",
    "--system-package=build, DESTDIR with a prefix": "_packages::test_a_whole_container_as_a_package",
    "--system-package=yes": "_packages::test_the_database_knows_the_files_and_they_are_handled_as_ever",
    "--system-package=yes: ostree": "_packages::test_an_ostree_host_takes_no_packages",
    "--system-package: what atomic installed": "_packages::test_a_package_that_atomic_installed_goes_with_its_files",
    # life
    "install: already present": "_verbs::test_a_name_that_is_present_is_left_alone",
    "install: unit exists": "_store::test_a_strangers_unit_is_not_replaced",
    "install: enabled, not started": "machines/test_containers.py::test_install_enables_and_does_not_start",
    "install: any error": "_crashes::test_a_failure_at_any_moment_leaves_the_host_as_it_was",
    "install --rootfs": "_verbs::test_a_root_file_system_elsewhere",
    "install --display": "_verbs::test_display_writes_nothing",
    "update: no-op, values kept": "_verbs::test_update",
    "update: stop, switch, start": "_verbs::test_update_stops_switches_and_starts",
    "update: tmpfiles --remove": "_verbs::test_stopped_lines_are_removed_on_update",
    "update --all": "_verbs::test_update_of_all_goes_on_after_a_failure",
    "update: automatic rollback": "machines/test_containers.py::test_an_update_that_does_not_come_up_is_rolled_back",
    "update: automatic rollback, firstboot run": "adapters/test_deeds.py::test_a_container_that_does_not_come_up_with_what_replaced_it_is_rolled_back",
    "update: automatic rollback after a power cut": "machines/test_containers.py::test_an_update_cut_short_that_does_not_come_up_is_rolled_back_at_boot",
    "update: port taken": "machines/test_containers.py::test_a_port_that_is_taken",
    "update: refused image": "machines/test_containers.py::test_an_image_that_is_refused_leaves_the_container_running",
    "update: target wiped first": "_store::test_the_target_deployment_is_wiped_first",
    "update: the link is switched in one step": "_crashes::test_the_next_call_makes_good_a_power_cut_at_any_moment",
    "update: full disk": "machines/test_containers.py::test_a_full_disk_halfway",
    "update: full disk, ostree": "_ostree::test_a_full_disk_during_an_import",
    "rollback toggles": "_verbs::test_rollback_goes_forth_and_back",
    "rollback: interrupted": "_crashes::test_an_interrupted_rollback_can_be_repeated",
    "uninstall": "machines/test_containers.py::test_uninstall",
    "list --json": "_verbs::test_list_as_openshift_ansible_reads_it",
    "what atomic installed": "_verbs::test_what_atomic_installed_is_rolled_back_updated_and_removed",
    # lint
    "lint: every rule": "_lint::test_each_rule_finds_what_it_is_for",
    "lint: exit code": "_lint::test_one_line_each_and_the_exit_code",
    # bad images
    "missing layer": "_images::test_a_missing_layer",
    "digest mismatch": "_images::test_a_damaged_blob",
    "digest mismatch, unpacked": "_ostree::test_a_layer_that_is_not_what_the_configuration_says",
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_its_test(row: str) -> None:
    file, _, function = ROWS[row].partition("::")
    path = ROOT / "tests" / (file if "/" in file else f"adapters/test_containers{file}.py")
    tree = ast.parse(path.read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
