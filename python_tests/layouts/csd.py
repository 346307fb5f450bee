"""CMU-MultimodalSDK's computational sequences, as `computational_sequence.py` there writes them."""

import json

import numpy as np

from layouts import Expected, ExpectedSample, Layout

VIDEOS = {f"-v{i}_": 4 + i % 2 for i in range(4)}
SEGMENT, WORD = 1.0, 0.25
EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
F = {"text": 4, "audio": 3, "visual": 2}
ROOTS = {"text": "glove_vectors", "audio": "COVAREP", "visual": "FACET_4.2"}
RATES = {"text": WORD, "audio": 0.1, "visual": 0.2}


def rows(modality, video):
    """(n, 2) seconds and (n, F) numbers of a whole video."""
    n = round(VIDEOS[video] * SEGMENT / RATES[modality])
    start = np.arange(n) * RATES[modality]
    rng = np.random.default_rng([ord(video[2]), len(modality)])
    return np.stack([start, start + RATES[modality]], 1), rng.normal(size=(n, F[modality])).astype("f4")


def labels(video, columns=1):
    out = np.zeros((VIDEOS[video], columns), "f4")
    out[:, 0] = np.arange(VIDEOS[video]) - 2.0 + 0.25 * list(VIDEOS).index(video)
    for k in range(1, columns):
        out[:, k] = (np.arange(VIDEOS[video]) + k) % 3 * (2 / 3)
    return out


def write_sequence(folder, root, videos, metadata=None, name=None):
    import h5py

    with h5py.File(folder / f"{name or root}.csd", "w") as file:
        for group, (intervals, features) in videos.items():
            at = file.create_group(f"{root}/data/{group}")
            at.create_dataset(
                "intervals", data=intervals.astype("f4"), compression="gzip", compression_opts=9
            )
            at.create_dataset("features", data=features, compression="gzip", compression_opts=9)
        for key, value in {"root name": root, **(metadata or {})}.items():
            file.create_dataset(f"{root}/metadata/{key}", (1,), h5py.string_dtype())[0] = json.dumps(value)
    return folder


def write_labels(folder, columns=1, metadata=None):
    spans = {v: np.stack([np.arange(n), np.arange(n) + 1.0], 1) * SEGMENT for v, n in VIDEOS.items()}
    root = "All Labels" if columns > 1 else "Opinion Segment Labels"
    return write_sequence(folder, root, {v: (spans[v], labels(v, columns)) for v in VIDEOS}, metadata)


def words(video):
    intervals, _ = rows("text", video)
    return intervals, np.array([[f"w{i % 5}".encode()] if i % 7 else [b"sp"] for i in range(len(intervals))])


def write(folder, columns=1, divided=False):
    folder = folder / "corpus"
    folder.mkdir()
    write_labels(folder, columns, {"dataset name": "CMU-MINI"})
    for modality, root in ROOTS.items():
        videos = {video: rows(modality, video) for video in VIDEOS}
        if divided:  # as aligned files have it: groups VIDEO[k], and rows in no order
            videos = {
                f"{video}[{k}]": (intervals[k::2][::-1], features[k::2][::-1])
                for video, (intervals, features) in videos.items()
                for k in (1, 0)
            }
        write_sequence(folder, root, videos)
    write_sequence(folder, "words", {video: words(video) for video in VIDEOS})
    return folder


def overlap(span, intervals):
    return np.minimum(span[1], intervals[:, 1]) - np.maximum(span[0], intervals[:, 0]) > 1e-5


def cut(modality, video, span, align):
    intervals, features = rows(modality, video)
    intervals = intervals.astype("f4").astype(float)
    if not align:
        return features[overlap(span, intervals)]
    steps = rows("text", video)[0].astype("f4").astype(float)
    return np.array(
        [features[overlap(s, intervals)].astype(float).mean(0) for s in steps[overlap(span, steps)]], "f4"
    )


def expected(columns=1, align=False, emotions=False):
    samples = []
    for video, n in VIDEOS.items():
        for k in range(n):
            span = np.array([k, k + 1.0])
            row = labels(video, columns)[k]
            samples.append(
                ExpectedSample(
                    f"{video}[{k}]",
                    {m: cut(m, video, span, align) for m in F},
                    (row[1:] > 0).astype(float).tolist() if emotions else float(row[0]),
                    {"video": video},
                    [w.decode() for w in words(video)[1][overlap(span, words(video)[0]), 0]],
                )
            )
    task = "multilabel" if emotions else "regression"
    targets = EMOTIONS if emotions else ("sentiment",) if columns == 7 else ("label",)
    return Expected({"train": samples}, task, targets, None if emotions else (-3.0, 3.0))


LAYOUTS = [
    Layout("csd", write, expected, needs="h5py"),
    Layout("csd aligned", write, lambda: expected(align=True), {"align": "text"}, "h5py"),
    Layout("csd divided", lambda f: write(f, divided=True), expected, needs="h5py"),
    Layout("csd of seven labels", lambda f: write(f, 7), lambda: expected(7), needs="h5py"),
    Layout(
        "csd emotions",
        lambda f: write(f, 7),
        lambda: expected(7, emotions=True),
        {"labels": "emotions"},
        "h5py",
    ),
]
