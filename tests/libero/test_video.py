"""Rollout videos: name, choice, file."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.robot.libero.video import SaveVideos, VideoBudget, keeps_video, rollout_path, write_video


def test_published_path():
    task = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    path = rollout_path("./rollouts/vla-adapter", "2025_09_01-18_26_23", 12, True, task)
    assert path == (
        "./rollouts/vla-adapter/2025_09_01/2025_09_01-18_26_23--episode=12--success=True"
        "--task=pick_up_the_black_bowl_between_the_plate_and_the_r.mp4"
    )
    assert rollout_path("r", "2025_09_01-18_26_23", 1, False, "Go.\nStop").endswith(
        "--success=False--task=go__stop.mp4"
    )


@pytest.mark.parametrize(
    ("choice", "limit", "kept"),
    [
        (SaveVideos.NONE, None, []),
        (SaveVideos.ALL, None, [0, 1, 2, 3]),
        (SaveVideos.ALL, 2, [0, 1]),
        (SaveVideos.FIRST, None, [0]),
        (SaveVideos.FIRST, 3, [0, 1, 2]),
        (SaveVideos.FAILURES, None, [1, 3]),
        (SaveVideos.FAILURES, 1, [1]),
        (SaveVideos.ALL, 0, []),
    ],
)
def test_budget(choice, limit, kept):
    budget = VideoBudget(choice, limit)
    written = []
    for index, success in enumerate([True, False, True, False]):
        reserved = budget.reserve()
        if reserved and keeps_video(choice, success):
            written.append(index)
        elif reserved:
            budget.give_back()
    assert written == kept


def test_episodes_under_way_count_against_the_budget():
    budget = VideoBudget(SaveVideos.FAILURES, 2)
    assert [budget.reserve() for _ in range(3)] == [True, True, False]
    budget.give_back()
    assert budget.reserve() and not budget.reserve()


def test_a_video_may_lie_in_a_folder_with_any_name(odd_folder):
    pytest.importorskip("imageio_ffmpeg")
    written = write_video(str(odd_folder / "%d.mp4"), [np.zeros((32, 32, 3), np.uint8)] * 2)
    assert [str(path) for path in odd_folder.iterdir()] == [written]


def test_video_is_written_completely_or_not_at_all(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = str(tmp_path / "deep" / "a.mp4")
    frames = [np.full((64, 48, 3), 20 * i, np.uint8) for i in range(10)]
    write_video(path, frames, fps=30 / 8)
    reader = imageio_ffmpeg.read_frames(path)
    meta = next(reader)
    decoded = [np.frombuffer(raw, np.uint8).mean() for raw in reader]
    assert meta["size"] == (48, 64) and meta["fps"] == pytest.approx(3.75)
    np.testing.assert_allclose(decoded, [20 * i for i in range(10)], atol=4)
    with pytest.raises(ValueError, match="frame 1"):
        write_video(str(tmp_path / "b.mp4"), [frames[0], frames[0][:32]])
    with pytest.raises(ValueError, match="at least one"):
        write_video(str(tmp_path / "b.mp4"), [])
    assert [p.name for p in tmp_path.rglob("*.*")] == ["a.mp4"]
