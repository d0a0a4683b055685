from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vo import tracks as tracks_module
from vo.tracks import TrackTable


def keypoints(num, value=0.0):
    return np.full((num, 2), value, np.float32)


def test_ids_are_stable_and_never_used_twice():
    table = TrackTable()
    first = table.observe(0, np.array([-1, -1, -1]), keypoints(3))
    second = table.observe(1, np.array([first[2], -1, first[0]]), keypoints(3, 1.0))
    assert second[0] == first[2]
    assert second[2] == first[0]
    table.prune(second)
    third = table.observe(2, np.array([-1]), keypoints(1, 2.0))
    assert len({*first, *second, *third}) == 5


def test_a_track_reports_where_it_was_seen():
    table = TrackTable()
    ids = table.observe(4, np.array([-1, -1]), np.array([[1, 2], [3, 4]], np.float32))
    table.observe(6, np.array([-1, ids[1]]), np.array([[9, 9], [5, 6]], np.float32))
    track = table.track(int(ids[1]))
    np.testing.assert_array_equal(track.frame_indices, [4, 6])
    np.testing.assert_array_equal(track.keypoints, [[3, 4], [5, 6]])
    assert track.p_world is None
    table.set_landmarks(ids[1:], np.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(table.track(int(ids[1])).p_world, [1, 2, 3])


def test_frame_tracks_describe_the_last_frame_only():
    table = TrackTable()
    ids = table.observe(0, np.array([-1, -1]), keypoints(2))
    table.set_landmarks(ids[:1], np.ones((1, 3)))
    table.observe(1, np.array([ids[0], -1]), keypoints(2, 7.0))
    tracks = table.frame_tracks(1, 55)
    assert tracks.timestamp_ns == 55
    np.testing.assert_array_equal(tracks.lengths, [2, 1])
    np.testing.assert_array_equal(tracks.has_landmark, [True, False])
    np.testing.assert_array_equal(tracks.keypoints, keypoints(2, 7.0))
    with pytest.raises(ValueError, match="frame_index"):
        table.frame_tracks(0, 0)


def test_landmarks_of_unknown_tracks_are_absent():
    table = TrackTable()
    points, known = table.landmarks(np.array([-1, 3]))
    assert np.isnan(points).all()
    assert not known.any()
    ids = table.observe(0, np.array([-1]), keypoints(1))
    table.set_landmarks(ids, np.ones((1, 3)))
    assert table.num_landmarks == 1
    table.drop_landmarks(ids)
    assert table.num_landmarks == 0
    with pytest.raises(KeyError):
        table.set_landmarks(np.array([99]), np.ones((1, 3)))
    with pytest.raises(KeyError):
        table.track(99)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 12), st.floats(0, 1)), min_size=1, max_size=12), st.integers(0, 2**31))
def test_agrees_with_a_dictionary(frames, seed):
    """Any sequence of births, extensions and deaths gives the lengths that plain bookkeeping gives."""
    rng = np.random.default_rng(seed)
    table, lengths, previous = TrackTable(), {}, np.zeros(0, np.int64)
    for index, (num_features, share) in enumerate(frames):
        extended = np.full(num_features, -1, np.int64)
        num_kept = min(int(share * num_features), len(previous))
        extended[rng.permutation(num_features)[:num_kept]] = rng.permutation(previous)[:num_kept]
        ids = table.observe(index, extended, keypoints(num_features))
        assert len(set(ids.tolist())) == num_features
        assert (ids[extended >= 0] == extended[extended >= 0]).all()
        lengths = {i: lengths.get(i, 0) + 1 for i in ids.tolist()}
        table.prune(ids)
        tracks = table.frame_tracks(index, index)
        assert dict(zip(tracks.track_ids.tolist(), tracks.lengths.tolist(), strict=True)) == lengths
        assert len(table) == num_features
        previous = ids


def test_history_is_bounded():
    table = TrackTable(max_history=5)
    ids = table.observe(0, np.array([-1]), keypoints(1))
    for index in range(1, 50):
        ids = table.observe(index, ids, keypoints(1))
    np.testing.assert_array_equal(table.track(int(ids[0])).frame_indices, np.arange(45, 50))
    assert table.frame_tracks(49, 0).lengths[0] == 50


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_rows_are_found_as_by_search_however_old_the_tracks_are(seed, span_per_track):
    """A few tracks live on while ids run far ahead of what is looked up at once."""
    rng = np.random.default_rng(seed)
    table, old = TrackTable(), np.zeros(0, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracks_module, "_SPAN_PER_TRACK", span_per_track)
        patch.setattr(tracks_module, "_MIN_SPAN", 4)
        for index in range(12):
            born = rng.integers(1, 30)
            extended = np.concatenate([rng.permutation(old)[: rng.integers(0, 4)], np.full(born, -1)])
            ids = table.observe(index, extended, keypoints(len(extended)))
            if rng.random() < 0.6:
                old = rng.permutation(np.concatenate([old, ids]))[: rng.integers(0, 12)]
                table.prune(np.concatenate([old, [-1]]))
            asked = rng.permutation(np.arange(-3, ids.max(initial=0) + 50))
            alive = table.ids(np.arange(len(table)))
            expected = [int(np.flatnonzero(alive == i)[0]) if i in alive else -1 for i in asked]
            np.testing.assert_array_equal(table.rows_of(asked), expected)
            assert (np.diff(alive) > 0).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31))
def test_shared_rows_are_numpys_intersection_of_live_tracks(seed):
    rng = np.random.default_rng(seed)
    table = TrackTable()
    ids = table.observe(0, np.full(40, -1), keypoints(40))
    kept = rng.permutation(ids)[:25]
    table.prune(kept)
    ids0, ids1 = (np.where(rng.random(15) < 0.2, -1, rng.permutation(40)[:15]) for _ in range(2))
    rows0, rows1 = table.shared_rows(ids0, ids1)
    expected = np.intersect1d(np.intersect1d(ids0[ids0 >= 0], ids1), kept)
    np.testing.assert_array_equal(ids0[rows0], expected)
    np.testing.assert_array_equal(ids1[rows1], expected)


def test_points_and_colours_stay_with_their_tracks_while_others_come_and_go():
    """Against a dictionary, over many frames: the columns grow, and are moved together where tracks have died."""
    rng = np.random.default_rng(0)
    table, truth, alive = TrackTable(), {}, np.zeros(0, np.int64)
    for index in range(40):
        extended = np.concatenate([rng.permutation(alive)[:20], np.full(30, -1)])
        colors = rng.integers(0, 256, (len(extended), 3)).astype(np.uint8)
        ids = table.observe(index, extended, keypoints(len(extended)), colors)
        points = rng.normal(size=(50, 3))[: len(ids)]
        for i, (before, color) in enumerate(zip(extended, colors, strict=True)):
            if before < 0:
                truth[ids[i]] = [color, None]
        some = rng.permutation(len(ids))[:10]
        table.set_landmarks(ids[some], points[some])
        for i in some:
            truth[ids[i]][1] = points[i]
        alive = rng.permutation(table.ids(np.arange(len(table))))[:60]
        table.prune(alive)
        found, has_landmark = table.landmarks(alive)
        for row, track_id in enumerate(alive):
            color, point = truth[track_id]
            np.testing.assert_array_equal(table.colors(alive)[row], color)
            assert has_landmark[row] == (point is not None)
            if point is not None:
                np.testing.assert_array_equal(found[row], point)
