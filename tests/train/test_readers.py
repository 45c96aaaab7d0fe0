"""Every format gives the same rows, untouched."""

import json

import pytest

from gradfold.train.errors import DataError
from gradfold.train.readers import read_rows

# Texts that readers like to improve: numbers, dates, missing values, quotes, line ends inside, other scripts.
TEXTS = ["007", "NA", "null", "2024-01-01", 'say "hi", twice', "two\nlines", "naïve 日本語", " spaces ", "1e5", "True"]


def write(path, columns):
    """`columns`: name -> values. Writes them in the format of the path's suffix."""
    import pandas

    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_texts_arrive_as_they_are(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", {"text": TEXTS, "extra": list(range(len(TEXTS)))})
    rows = list(read_rows([str(path)]))
    assert [row.text for row in rows] == TEXTS
    assert {row.shape for row in rows} == {"text"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_prompts_and_completions_arrive_as_they_are(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", {"completion": TEXTS[::-1], "prompt": TEXTS})
    rows = list(read_rows([str(path)]))
    assert [(row.prompt, row.completion) for row in rows] == list(zip(TEXTS, TEXTS[::-1], strict=True))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_messages_arrive_without_made_up_keys(tmp_path, suffix):
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "2024-01-01"}],
        [{"role": "user", "content": "again", "name": "ann"}, {"role": "assistant", "content": "yes"}],
    ]
    rows = list(read_rows([str(write(tmp_path / f"a.{suffix}", {"messages": chats}))]))
    assert [list(row.messages) for row in rows] == chats


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo  \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("three", encoding="utf-8")
    rows = list(read_rows([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]))
    assert [row.text for row in rows] == ["one\n\ntwo  \n", "three"]


def test_json_lines_may_hold_blank_lines_other_keys_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "a", "n": 1}', "", '{"text": "b", "n": "one"}', "   ", '{"n": {"x": 1}, "text": "c"}']
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    rows = list(read_rows([str(path)]))
    assert [(row.text, row.where.split()[-1]) for row in rows] == [("a", "1"), ("b", "3"), ("c", "5")]


def test_a_json_file_may_be_lines_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert [row.text for row in read_rows([str(path)])] == ["a", "b"]


def test_a_name_may_hold_glob_characters(tmp_path):
    path = write(tmp_path / "a[1]*.csv", {"text": ["x"]})
    assert [row.text for row in read_rows([str(path)])] == ["x"]


def test_lines_of_a_csv_are_counted_through_quoted_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"two\nlines",1\nb,2\n\nc\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv line 6: has 1 cells, the header 2"):
        list(read_rows([str(path)]))


def test_rows_come_before_the_bad_one_is_reached(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    rows = read_rows([str(path)])
    assert next(rows).text == "a"
    with pytest.raises(DataError, match=r"a\.jsonl line 2: is not JSON"):
        next(rows)


def test_pydoc_needs_no_file():
    rows = list(read_rows(["pydoc"]))
    assert len(rows) > 50 and sum(len(row.text) for row in rows) > 300_000


def test_nothing_is_cached_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "a.csv", {"text": TEXTS})
    list(read_rows([str(path)]))
    assert not (tmp_path / "cache").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv"]
