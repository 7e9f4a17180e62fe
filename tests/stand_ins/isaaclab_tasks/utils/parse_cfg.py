from types import SimpleNamespace


def parse_env_cfg(task_name: str, device: str, num_envs: int, overrides: list[str] = []) -> SimpleNamespace:  # noqa: B006
    given = dict(text.split("=") for text in overrides)
    return SimpleNamespace(
        scene=SimpleNamespace(num_envs=num_envs),
        sim=SimpleNamespace(device=device),
        physics=given.get("physics", "newton_mjwarp"),
        is_finite_horizon=given.get("env.is_finite_horizon") == "true",
        compute_final_obs=False,
    )
