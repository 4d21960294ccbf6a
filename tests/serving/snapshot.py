"""What SGLang consists of at one moment, to see whether anything of it was assigned to or replaced."""

import inspect
import sys

# SGLang replaces this function itself when a scheduler starts (`srt.utils.common.monkey_patch_p2p_access_check`).
_REPLACED_BY_SGLANG = {"sglang.srt.distributed.device_communicators.custom_all_reduce_utils.gpu_p2p_access_check"}


def sglang_objects() -> dict[str, object]:
    """Every function and class of SGLang's loaded modules, and every attribute of its classes, by name."""
    found: dict[str, object] = {}
    for module_name, module in sorted(sys.modules.items()):
        if module is None or not module_name.startswith("sglang"):
            continue
        for name, value in vars(module).copy().items():
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{module_name}.{name}"] = value
            if inspect.isclass(value) and value.__module__.startswith("sglang"):
                for attribute, member in vars(value).copy().items():
                    if callable(member) or isinstance(member, classmethod | staticmethod | property):
                        found[f"{module_name}.{name}.{attribute}"] = member
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    differ = {name for name, value in before.items() if after.get(name) is not value}
    return sorted(differ - _REPLACED_BY_SGLANG)
