from typing import Any


def validate_launch(cfg: Any, launcher_args: Any = None) -> tuple[Any, tuple[str, ...]]:
    return None, ("Isaac Sim PhysX physics (`PhysxCfg`)",) if cfg.physics == "isaacsim_physx" else ()
