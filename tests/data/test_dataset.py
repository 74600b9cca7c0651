"""Data sets, vocabulary and training batches."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from captioner.data.dataset import (
    CaptionDataset,
    TrainingBatches,
    check_no_overlap,
    encode_captions,
    pad,
)
from captioner.data.vocabulary import BOS, EOS, PAD, SPECIAL_WORDS, UNK, Vocabulary
from captioner.errors import CheckpointError, DataError

FLICKR8K = Path(__file__).parents[2] / ".." / "shared" / "data" / "flickr8k"


@pytest.fixture
def folder(tmp_path):
    """Two splits of four images each; ids are integers in one and text in the other."""
    (tmp_path / "images").mkdir()
    for split, ids in (("train", [1, 2, 3, 4]), ("val", ["5", "6", "7", "8"])):
        for i in ids:
            (tmp_path / "images" / f"{i}.jpg").write_bytes(b"not looked at")
        write_split(tmp_path, split, [(i, f"{i}.jpg", [f"Dog {i}", "a dog"]) for i in ids])
    return tmp_path


def write_split(folder, name, rows):
    content = {
        "images": [{"id": i, "file_name": file_name} for i, file_name, _ in rows],
        "annotations": [
            {"id": f"{i}/{n}", "image_id": i, "caption": caption}
            for i, _, captions in rows
            for n, caption in enumerate(captions)
        ],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))


def load(folder, name="train", **options):
    return CaptionDataset.load(folder / f"{name}.json", folder / "images", **options)


# --- CaptionDataset -------------------------------------------------------------------------


def test_a_data_set(folder):
    train, val = load(folder), load(folder, "val")
    assert len(train) == 4
    assert train.image_ids == [1, 2, 3, 4]
    assert val.image_ids == ["5", "6", "7", "8"]
    assert train.paths[2] == folder / "images" / "3.jpg"
    assert train.references[3] == ["Dog 3", "a dog"]
    assert train.select([2, 0]).image_ids == [3, 1]
    assert train.select([2, 0]).references == {3: ["Dog 3", "a dog"], 1: ["Dog 1", "a dog"]}


def test_missing_images_are_refused_with_ids_and_counts(folder):
    (folder / "images" / "2.jpg").unlink()
    (folder / "images" / "4.jpg").unlink()
    (folder / "images" / "4.jpg").mkdir()  # a folder is no image
    with pytest.raises(DataError, match=r"2 of 4 images are not in .*\(ids 2, 4; .*2\.jpg") as e:
        load(folder)
    assert str(e.value).startswith(str(folder / "train.json"))
    assert "data.bad_images=skip" in str(e.value)


def test_missing_images_are_skipped_with_a_warning(folder, capsys):
    (folder / "images" / "2.jpg").unlink()
    assert load(folder, missing="skip").image_ids == [1, 3, 4]
    assert "1 of 4 images are not in" in capsys.readouterr().err


def test_all_images_missing_is_an_error_even_when_skipping(folder):
    with pytest.raises(DataError, match=r"4 of 4 images are not in"):
        CaptionDataset.load(folder / "train.json", folder, missing="skip")


def test_a_file_name_that_no_file_system_takes_is_missing(folder):
    rows = [(1, "1.jpg", ["a dog"]), (2, "x" * 300, ["a dog"]), (3, "a\0b.jpg", ["a dog"])]
    write_split(folder, "train", rows)
    with pytest.raises(DataError, match="2 of 3 images are not in"):
        load(folder)


def test_images_without_a_file_name_are_refused(folder):
    write_split(folder, "train", [(1, "1.jpg", ["a"]), (2, None, ["b"]), (3, None, [])])
    with pytest.raises(DataError, match=r"1 images have no 'file_name' \(ids 2\)"):
        load(folder)


def test_what_is_left_out_is_reported(folder, capsys):
    rows = [(1, "1.jpg", ["a dog", " "]), (2, "2.jpg", ["...", "``"]), (3, "3.jpg", [])]
    write_split(folder, "train", rows)
    data = load(folder)
    assert data.references == {1: ["a dog"]}
    told = capsys.readouterr().err
    assert "1 empty captions left out (ids 1/1)" in told
    assert "1 images have no caption (ids 3)" in told
    assert "2 captions without a word" in told


def test_repeated_captions_of_an_image_are_counted_and_kept(folder, capsys):
    rows = [(1, "1.jpg", ["a dog", "A dog.", "a cat"]), (2, "2.jpg", ["a dog", "a bird"])]
    write_split(folder, "train", rows)
    assert load(folder).captions[0] == ["a dog", "A dog.", "a cat"]
    assert "1 of 5 captions repeat another of the same image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("unspaced", "spaced"),
    [
        ("一只棕色的狗在草地上奔跑", "一只 棕色 的 狗 在 草地 上 奔跑"),
        ("犬が芝生の上を走っている", "犬 が 芝生 の 上 を 走っ て いる"),
        ("สุนัขสีน้ำตาลวิ่งบนหญ้า", "สุนัข สีน้ำตาล วิ่ง บน หญ้า"),
    ],
    ids=["Chinese", "Japanese", "Thai"],
)
def test_captions_without_spaces_between_words_are_warned_of(folder, capsys, unspaced, spaced):
    rows = [(1, "1.jpg", [unspaced, spaced]), (2, "2.jpg", ["internationalisation über alles"])]
    write_split(folder, "train", rows)
    load(folder)
    message = "1 of 3 captions are in a script without spaces between words (Chinese, Japanese"
    assert message in capsys.readouterr().err
    write_split(folder, "train", [(1, "1.jpg", [spaced]), rows[1]])
    load(folder)
    assert "script" not in capsys.readouterr().err


@pytest.mark.parametrize("captions", [[], [" "], ["..."]])
def test_nothing_left_is_an_error(folder, captions):
    write_split(folder, "train", [(1, "1.jpg", captions)])
    with pytest.raises(DataError, match=r"train\.json: no image with a caption"):
        load(folder)


def test_splits_of_one_file(folder):
    rows = ["image,caption,split"] + [
        f"{i}.jpg,dog,{'train' if i < 3 else 'val'}" for i in range(1, 5)
    ]
    (folder / "c.csv").write_text("\n".join(rows))
    train, val = (
        CaptionDataset.load(folder / "c.csv", folder / "images", split)
        for split in ("train", "val")
    )
    assert (train.image_ids, val.image_ids) == (["1.jpg", "2.jpg"], ["3.jpg", "4.jpg"])
    assert train.name.endswith("c.csv (split train)")
    check_no_overlap(train, val)


def test_overlapping_splits_are_refused_with_ids_and_counts(folder):
    check_no_overlap(load(folder), load(folder, "val"))
    write_split(folder, "val", [("x", "2.jpg", ["a"]), ("y", "5.jpg", ["a"]), (3, "3.jpg", ["a"])])
    with pytest.raises(DataError, match=r"val\.json: 2 of its images are in .*train\.json") as e:
        check_no_overlap(load(folder), load(folder, "val"))
    assert "(ids x, 3)" in str(e.value)


def test_an_overlap_through_links_is_refused(folder):
    (folder / "images" / "other.jpg").symlink_to(folder / "images" / "2.jpg")
    (folder / "linked").symlink_to(folder / "images")
    write_split(folder, "val", [(1, "other.jpg", ["a"])])
    with pytest.raises(DataError, match="1 of its images"):
        check_no_overlap(load(folder), load(folder, "val"))
    again = CaptionDataset.load(folder / "train.json", folder / "linked" / ".." / "images")
    with pytest.raises(DataError, match="4 of its images"):
        check_no_overlap(load(folder), again)


# --- Vocabulary -----------------------------------------------------------------------------


def test_special_words_are_distinct_and_first():
    vocabulary = Vocabulary.from_captions(["a dog"])
    assert sorted({PAD, BOS, EOS, UNK}) == [0, 1, 2, 3]
    assert vocabulary.words == (*SPECIAL_WORDS, "a", "dog")
    assert [vocabulary.words[i] for i in (PAD, BOS, EOS, UNK)] == list(SPECIAL_WORDS)


def test_words_are_counted_and_ordered_by_count_then_name():
    captions = ["B a c", "b A", "b d"]
    assert Vocabulary.from_captions(captions).words[4:] == ("b", "a", "c", "d")
    assert Vocabulary.from_captions(reversed(captions)).words[4:] == ("b", "a", "c", "d")
    assert Vocabulary.from_captions(captions, min_count=2).words[4:] == ("b", "a")
    assert Vocabulary.from_captions(captions, min_count=4).words == SPECIAL_WORDS


def test_captions_become_ids_and_words_again():
    vocabulary = Vocabulary.from_captions(["a dog runs"])
    ids = vocabulary.encode("A cat runs.")
    assert ids == [4, UNK, 6]
    assert vocabulary.decode([*ids, EOS, 5, PAD]) == "a <unk> runs"
    assert vocabulary.decode([4, PAD, 5]) == "a"
    assert vocabulary.decode([]) == ""


def test_words_that_look_special_are_not():
    vocabulary = Vocabulary.from_captions(["<eos> <pad> dog"])
    assert not {PAD, BOS, EOS} & set(vocabulary.encode("<eos> <pad> <bos> <unk> dog"))


@pytest.mark.parametrize("words", [[], ["a"], [*SPECIAL_WORDS[::-1], "a"], [*SPECIAL_WORDS, *"aa"]])
def test_a_damaged_word_list_is_refused(words):
    with pytest.raises(CheckpointError, match="vocabulary"):
        Vocabulary(words)


def test_captions_of_a_data_set_are_encoded_in_its_order(folder):
    train = load(folder)
    vocabulary = Vocabulary.from_captions(["a dog 1 3"])
    ids = encode_captions(train, vocabulary)
    words = [[vocabulary.decode(caption) for caption in image] for image in ids]
    assert words[:3] == [["dog 1", "a dog"], ["dog <unk>", "a dog"], ["dog 3", "a dog"]]


# --- Batches --------------------------------------------------------------------------------


def test_padding():
    assert pad([[[7, 8], [9]], [[5, 6, 4]]]).tolist() == [
        [[BOS, 7, 8, EOS, PAD], [BOS, 9, EOS, PAD, PAD]],
        [[BOS, 5, 6, 4, EOS], [PAD] * 5],
    ]
    assert pad([[[]]]).tolist() == [[[BOS, EOS]]]
    assert pad([[[7]]]).dtype == torch.int64


def some_captions(images=50):
    """Captions that can be told apart: image i has 1 to 6 of 1 to 9 words, starting 100 * i + k."""
    return [
        [[100 * i + k + 10] * (1 + (7 * i + 3 * k) % 9) for k in range(1 + i % 6)]
        for i in range(images)
    ]


def captions_of(batch):
    return [
        [[t for t in row if t not in (PAD, BOS, EOS)] for row in per_image if row[0] != PAD]
        for per_image in batch.token_ids.tolist()
    ]


def test_an_epoch_has_every_image_once_with_its_own_captions():
    captions = some_captions()
    batches = TrainingBatches(captions, 8, 3, seed=0, max_words=40)
    assert len(batches) == 7
    for epoch in range(3):
        cut = batches.epoch(epoch)
        assert len(cut) == len(batches)
        assert sorted(i for batch in cut for i in batch.images) == list(range(50))
        assert sorted(len(batch.images) for batch in cut) == [2] + [8] * 6
        for batch in cut:
            assert batch.token_ids.shape[:2] == (len(batch.images), batch.token_ids.shape[1])
            for image, chosen in zip(batch.images, captions_of(batch), strict=True):
                assert len(chosen) == min(3, len(captions[image]))
                assert all(caption in captions[image] for caption in chosen)
                assert len({caption[0] for caption in chosen}) == len(chosen)  # none twice


def test_every_row_is_a_whole_caption_and_nothing_is_wider_than_needed():
    for batch in TrainingBatches(some_captions(), 8, 3, seed=0, max_words=40).epoch(0):
        for row in batch.token_ids.flatten(0, 1).tolist():
            real = [token for token in row if token != PAD]
            assert row == real + [PAD] * (len(row) - len(real))
            assert not real or (real[0] == BOS and real[-1] == EOS)
            assert BOS not in real[1:]
            assert EOS not in real[:-1]
        assert (batch.token_ids[..., -1] != PAD).any()
        assert (batch.token_ids[:, -1] != PAD).any()


def test_all_captions_come_up_over_the_epochs():
    captions = some_captions()
    batches = TrainingBatches(captions, 8, 2, seed=0, max_words=40)
    seen = Counter()
    for epoch in range(30):
        for batch in batches.epoch(epoch):
            seen.update(caption[0] for image in captions_of(batch) for caption in image)
    assert set(seen) == {caption[0] for image in captions for caption in image}
    assert {seen[caption[0]] for image in captions if len(image) <= 2 for caption in image} == {30}


def the_same(one, other):
    return [(b.images, b.token_ids.tolist()) for b in one] == [
        (b.images, b.token_ids.tolist()) for b in other
    ]


def test_seed_and_epoch_alone_decide():
    def cut(seed, epoch):
        torch.manual_seed(epoch + 17 * seed)
        return TrainingBatches(some_captions(), 8, 2, seed, max_words=40).epoch(epoch)

    assert the_same(cut(0, 3), cut(0, 3))
    used = TrainingBatches(some_captions(), 8, 2, 0, max_words=40)
    for epoch in range(3):
        used.epoch(epoch)
    assert the_same(used.epoch(3), cut(0, 3))
    assert not the_same(cut(0, 3), cut(0, 4))
    assert not the_same(cut(0, 3), cut(1, 3))


def test_long_captions_are_cut():
    for batch in TrainingBatches(some_captions(), 8, 3, 0, max_words=4).epoch(0):
        assert batch.token_ids.shape[2] <= 6
        assert (batch.token_ids == EOS).sum(-1).max() == 1


@pytest.mark.parametrize(("images", "batch_size"), [(1, 8), (8, 8), (9, 8), (3, 1)])
def test_small_and_uneven_data_sets(images, batch_size):
    batches = TrainingBatches(some_captions(images), batch_size, 5, 0, 40)
    cut = batches.epoch(0)
    assert len(cut) == len(batches)
    assert sorted(i for batch in cut for i in batch.images) == list(range(images))


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs ../shared/data/flickr8k")
@pytest.mark.parametrize(("captions_per_image", "share"), [(1, 0.5), (5, 0.9)])
def test_batches_of_equal_length_save_padding_on_flickr8k(captions_per_image, share):
    data = CaptionDataset.load(
        FLICKR8K / "annotations/captions_train.json", FLICKR8K / "images", missing="error"
    )
    vocabulary = Vocabulary.from_captions((c for image in data.captions for c in image), 5)
    captions = encode_captions(data, vocabulary)

    def padding(batches):
        real = sum(int((ids != PAD).sum()) for ids in batches)
        return sum(ids.numel() for ids in batches) / real - 1

    bucketed = TrainingBatches(captions, 64, captions_per_image, 0, 40).epoch(0)
    chosen = {
        image: rows
        for batch in bucketed
        for image, rows in zip(batch.images, captions_of(batch), strict=True)
    }
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).tolist()
    at_random = [pad([chosen[i] for i in order[s : s + 64]]) for s in range(0, len(order), 64)]
    ratio = padding([batch.token_ids for batch in bucketed]) / padding(at_random)
    assert ratio < share
