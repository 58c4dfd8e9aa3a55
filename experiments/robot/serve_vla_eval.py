"""Serve a checkpoint to the benchmarks of `vla-eval` (https://pypi.org/project/vla-eval, extra `vla-eval`).

    python -m experiments.robot.serve_vla_eval --args.pretrained_checkpoint DIR --args.unnorm_key libero_spatial

The harness runs the simulators and asks this process for actions. The server tells it what the policy needs: the wrist
camera, the state without folded quaternions, and environments seeded with 0.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.robot.libero.controls import to_simulator_actions
from prismatic.command_line import bad_input_in_one_line, is_installed, require_package

if TYPE_CHECKING:
    from experiments.robot.policy import VLAPolicy


def policy_inputs(obs: dict[str, Any], num_images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """What the harness sends -> arguments of `VLAPolicy.predict`.

    Args:
        obs: `images` {camera: (H, W, 3) uint8, upright}, third-person camera first, `states` (or `state`) (8,),
            `task_description`.
        num_images: images the policy looks at.

    Returns:
        (image, wrist_image, state, instruction); a one-image policy gets its image twice and reads the first.

    Raises:
        ValueError: too few cameras, or no state of 8 numbers; names what was found.
    """
    views = [np.asarray(view, dtype=np.uint8) for view in (obs.get("images") or {}).values()]
    if len(views) < num_images:
        found = sorted(obs.get("images") or {})
        raise ValueError(f"observation: images: expected {num_images} cameras, found {found}")
    state = np.asarray(obs.get("states", obs.get("state", [])), dtype=np.float64)
    if state.shape != (8,):
        raise ValueError(f"observation: states: expected position, axis-angle and fingers (8,), found {state.shape}")
    return views[0], views[min(1, num_images - 1)], state, str(obs.get("task_description", ""))


def _load(data_set_file: str, *checkpoint: Any, **given: Any) -> VLAPolicy:
    from experiments.robot.policy import VLAPolicy
    from prismatic.vla.datasets.registry import load_data_set_file

    if data_set_file:
        load_data_set_file(data_set_file)
    return VLAPolicy.from_checkpoint(*checkpoint, **given)


def server_class() -> type:
    """The model server. A function, so that the rest of the package does without `vla-eval`.

    Raises ModuleNotFoundError when that is not installed.
    """
    from vla_eval.model_servers.predict import PredictModelServer
    from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, ROTATION_AA
    from vla_eval.specs import STATE_EEF_POS_AA_GRIP as STATE

    class CraftModelServer(PredictModelServer):
        """Actions of one checkpoint; the harness hands out the chunk step by step.

        Args:
            pretrained_checkpoint: checkpoint folder, ours or published.
            unnorm_key: key of the normalisation statistics; empty: the only one.
            num_open_loop_steps: actions executed of each chunk.
            device: torch device.
            data_set_file, robot_platform: of a published folder for a robot of one's own (docs/evaluation.md).
            base_checkpoint: where the base of LoRA adapters is now.
        """

        def __init__(  # noqa: PLR0913 -- flags of the program
            self,
            pretrained_checkpoint: str,
            unnorm_key: str = "",
            num_open_loop_steps: int = 8,
            device: str = "cpu",
            data_set_file: str = "",
            robot_platform: str = "",
            base_checkpoint: str = "",
        ) -> None:
            super().__init__(chunk_size=num_open_loop_steps)
            given = {"base": base_checkpoint or None, "robot": robot_platform or None}
            self.policy = _load(data_set_file, pretrained_checkpoint, device, unnorm_key or None, **given)
            self.num_images = self.policy.metadata["num_images"]

        def predict(self, obs: dict[str, Any], ctx: Any) -> dict[str, np.ndarray]:
            """{"actions": (K, 7) float32} in the simulator's convention (gripper +1 = close)."""
            actions = to_simulator_actions(self.policy.predict(*policy_inputs(obs, self.num_images)))
            return {"actions": actions.astype(np.float32)}

        def get_observation_params(self) -> dict[str, Any]:
            """Settings of the LIBERO benchmarks that the policy depends on."""
            wrist = self.num_images > 1
            return {"send_wrist_image": wrist, "send_state": True, "env_seed": 0, "quat_no_antipodal": True}

        def get_action_spec(self) -> dict[str, Any]:
            """Position and rotation deltas, gripper with +1 = close."""
            return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

        def get_observation_spec(self) -> dict[str, Any]:
            """Cameras as the LIBERO benchmarks name them, state and instruction."""
            views = {"agentview": IMAGE_RGB} | ({"wrist": IMAGE_RGB} if self.num_images > 1 else {})
            return views | {"state": STATE, "language": LANGUAGE}

    return CraftModelServer


def main() -> None:
    """Serve until interrupted; the flags are those of `vla-eval` (`--port`, `--address`) and `--args.<name>`."""
    with bad_input_in_one_line("serve_vla_eval"):
        if not is_installed("vla_eval") and {"-h", "--help"} & set(sys.argv):
            print(__doc__)  # the flags are listed by the package that reads them
            return
        require_package("serve_vla_eval", "vla_eval", "vla-eval")
        from vla_eval.model_servers.serve import run_server

        run_server(server_class())


if __name__ == "__main__":
    main()
