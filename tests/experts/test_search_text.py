import pytest

from mttl_experts import ExpertInfo, ExpertLibrary
from mttl_experts.search.text import TextIndex


def index(*infos):
    return TextIndex({info.expert_name: info for info in infos})


def names(index, query, limit=10):
    return [name for name, _ in index.nearest(query, limit)]


@pytest.fixture
def some():
    return index(
        ExpertInfo("arith_v2", "add_numbers", tags=("math",)),
        ExpertInfo("gsm8k", "grade_school_math", extra={"description": "Word problems for kids."}),
        ExpertInfo("wiki-qa", ("wiki_qa", "triviaQA"), parents=("gsm8k",)),
        ExpertInfo("zulu", "translate to isiZulu", expert_model="org/zulu-base"),
    )


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("arith_v2", "arith_v2"),
        ("ARITH V2", "arith_v2"),
        ("numbers", "arith_v2"),
        ("kids", "gsm8k"),
        ("school", "gsm8k"),
        ("trivia", "wiki-qa"),
        ("zulu-base", "zulu"),
        ("arithmetic", "arith_v2"),
        ("translation", "zulu"),
        ("gsm", "gsm8k"),
        ("gsm8", "gsm8k"),
        ("numbrs", "arith_v2"),
    ],
)
def test_words_and_their_near_forms_find_what_has_them(some, query, first):
    assert names(some, query)[0] == first


def test_a_name_counts_more_than_a_mention(some):
    assert names(some, "gsm8k")[:2] == ["gsm8k", "wiki-qa"]


@pytest.mark.parametrize("query", ["", "  ", "!?", "xylophone", "qqqqqq"])
def test_what_has_nothing_in_common_is_not_found(some, query):
    assert names(some, query) == []


def test_scores_fall_and_lie_between_0_and_1(some):
    found = some.nearest("math word problems wiki", 10)
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)
    assert len(some.nearest("math word problems wiki", 2)) == 2


def test_equal_ones_come_in_the_order_of_their_names():
    same = index(*(ExpertInfo(f"e{n}", "one task") for n in range(9)))
    assert names(same, "one task") == [f"e{n}" for n in range(9)]


def test_a_word_in_few_experts_says_more_than_one_in_many():
    many = index(*(ExpertInfo(f"e{n}", "common task") for n in range(20)), ExpertInfo("x", "rare"))
    assert names(many, "common rare")[0] == "x"


def test_other_scripts_are_words_too():
    some = index(ExpertInfo("a", "перевод текста"), ExpertInfo("b", "翻译"), ExpertInfo("c", "été"))
    assert names(some, "ПЕРЕВОД") == ["a"]
    assert names(some, "翻译") == ["b"]
    assert names(some, "ÉTÉ") == ["c"]


def test_no_experts_are_no_matches():
    assert TextIndex({}).nearest("math", 5) == []


def test_a_library_is_searched_as_it_is_now(library):
    from mttl_experts import Expert

    library.add_expert(Expert(ExpertInfo("one", "sums")))
    assert [m.name for m in library.search("sums")] == ["one"]
    library.add_expert(Expert(ExpertInfo("two", "sums")))
    library.update_info("one", expert_task_name="poems", tags=("verse",))
    assert [m.name for m in library.search("sums")] == ["two"]
    assert [m.name for m in library.search("verse", limit=1)] == ["one"]
    library.remove_expert("two")
    assert library.search("sums") == []
    part = ExpertLibrary(library.uri, exclude_selection="one")
    assert part.search("verse") == []
