"""Displaced initial states: seeded draws, rejection, and the real scene."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.robot.libero import init_noise
from experiments.robot.libero.init_noise import (
    InitNoiseError,
    Settled,
    displace_objects,
    draw_offsets,
    faulty_objects,
    stacks,
)


def settled(positions: dict, contacts=(), up=(0.0, 0.0, 1.0)) -> Settled:
    return Settled(
        {name: np.array(at, dtype=float) for name, at in positions.items()},
        {name: np.array(up) for name in positions},
        frozenset(contacts),
    )


def test_draws_stay_in_the_disc_and_groups_move_together():
    draws = [
        draw_offsets(np.random.default_rng([7, 3, i]), [("bowl", "ramekin"), ("plate",)], 0.02, lambda offsets: set())
        for i in range(200)
    ]
    sizes = np.array([np.linalg.norm(draw["bowl"]) for draw in draws])
    assert sizes.max() <= 0.02 and 0.012 < sizes.mean() < 0.0147  # 2/3 of the radius in a disc
    assert all((draw["bowl"] == draw["ramekin"]).all() and (draw["bowl"] != draw["plate"]).any() for draw in draws)


def test_only_faulty_groups_are_drawn_again():
    seen = []

    def faulty(offsets):
        seen.append({name: offset.copy() for name, offset in offsets.items()})
        return {"plate"} if len(seen) < 3 else set()

    found = draw_offsets(np.random.default_rng(0), [("bowl",), ("plate",)], 0.02, faulty)
    assert len(seen) == 3 and (found["bowl"] == seen[0]["bowl"]).all()
    assert not np.allclose(seen[0]["plate"], seen[1]["plate"])


def test_an_impossible_radius_is_an_error():
    with pytest.raises(InitNoiseError, match=r"init_noise_mm 500: .*\['bowl'\]"):
        draw_offsets(np.random.default_rng(0), [("bowl",)], 0.5, lambda offsets: {"bowl"})


def test_faults_are_shift_fall_tilt_and_new_contacts():
    start = {"bowl": (0, 0, 0.9), "plate": (0.2, 0, 0.9)}
    reference = settled(start, [("bowl", "body 3")])
    offsets = {"bowl": np.array([0.01, 0.0]), "plate": np.zeros(2)}
    good = {"bowl": (0.01, 0, 0.9), "plate": (0.2, 0, 0.9)}
    assert faulty_objects(offsets, reference, settled(good, [("bowl", "body 3")])) == set()
    assert faulty_objects(offsets, reference, settled(good | {"bowl": (0.02, 0, 0.9)})) == {"bowl"}
    assert faulty_objects(offsets, reference, settled(good | {"plate": (0.2, 0, 0.8)})) == {"plate"}
    assert faulty_objects(offsets, reference, settled(good, [("bowl", "plate")])) == {"bowl", "plate"}
    assert faulty_objects(offsets, reference, settled(good, up=(0.0, 0.2, 0.98))) == {"bowl", "plate"}


def test_objects_in_contact_form_a_stack():
    found = stacks(["a", "b", "c", "d"], frozenset([("a", "c"), ("b", "body 1"), ("c", "d")]))
    assert found == [("a", "c", "d"), ("b",)]


class CrowdedScene:
    """Stands in for `SceneProbe`: the plate touches the bowl when it moves by more than `room_m`."""

    room_m = 0.0

    def __init__(self, env):
        self.objects = {"bowl": (0, 0), "plate": (7, 1)}

    def settle(self, offsets):
        shift = {name: offsets.get(name, np.zeros(2)) for name in self.objects}
        places = {"bowl": (*shift["bowl"], 0.9), "plate": (0.2 + shift["plate"][0], shift["plate"][1], 0.9)}
        touching = np.linalg.norm(shift["plate"]) > self.room_m
        return settled(places, [("bowl", "plate")] if touching else [])

    def displaced_state(self, offsets):
        return np.zeros(1)


class Env:
    def set_state(self, state):
        self.state = state


def test_without_room_a_collection_fails_and_an_evaluation_displaces_by_less(monkeypatch):
    monkeypatch.setattr(init_noise, "SceneProbe", CrowdedScene)
    with pytest.raises(InitNoiseError, match=r"init_noise_mm 20: .*plate"):
        displace_objects(Env(), 20.0, (0, 0, 0))
    found = displace_objects(Env(), 20.0, (0, 0, 0), or_less=True)
    assert set(map(tuple, found.values())) == {(0.0, 0.0)}


def test_displacing_by_less_changes_nothing_where_there_is_room(monkeypatch):
    monkeypatch.setattr(init_noise, "SceneProbe", CrowdedScene)
    monkeypatch.setattr(CrowdedScene, "room_m", 1.0)
    whole = displace_objects(Env(), 20.0, (0, 0, 0))
    assert displace_objects(Env(), 20.0, (0, 0, 0), or_less=True) == whole and any(map(any, whole.values()))


@pytest.mark.simulator
@pytest.mark.slow
def test_displaced_bowl_still_rests_on_the_ramekin():
    pytest.importorskip("libero")
    from experiments.robot.libero.modes import RenderMode, ResetMode
    from experiments.robot.libero.simulator import LiberoEnv
    from experiments.robot.libero.tasks import load_task

    task = load_task("libero_spatial", 5)
    env = LiberoEnv(task, render=False, render_mode=RenderMode.LAZY, reset_mode=ResetMode.SOFT)

    def start(key):
        env.reset(task.init_states[0], seed=0)
        return displace_objects(env, 20.0, key), env.sim.get_state().flatten()

    (first, state), (again, same_state), (other, _) = start((7, 5, 0)), start((7, 5, 0)), start((7, 5, 1))
    assert first == again and (state == same_state).all() and first != other
    assert first["akita_black_bowl_1"] == first["glazed_rim_porcelain_ramekin_1"] != first["plate_1"]
    assert all(0 < np.linalg.norm(offset) <= 20.0 for offset in first.values())
    env.settle()
    bowl, ramekin = (
        env.sim.data.body_xpos[env.domain.obj_body_id[name]]
        for name in ("akita_black_bowl_1", "glazed_rim_porcelain_ramekin_1")
    )
    assert bowl[2] - ramekin[2] == pytest.approx(0.0351, abs=5e-4)
    env.close()
