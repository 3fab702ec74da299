"""Invented items of every task, as rows of local files and as rows of the hub's data sets."""

import json
from pathlib import Path
from typing import Any

LOCAL: dict[str, list[dict[str, Any]]] = {
    "arc_easy.jsonl": [
        {"query": "Question: What is ice?", "choices": ["frozen water", "a stone", "hot air"], "gold": 0},
        {"query": "Question: What do cows eat?", "choices": ["grass", "sand"], "gold": 0},
        {"query": "Question: Which one flies?", "choices": ["a fish", "a shoe", "a bird", "a hat"], "gold": 2},
    ],
    "arc_challenge.jsonl": [
        {"query": "Question: Why is it dark?", "choices": ["the sun is down", "it is late"], "gold": 0},
        {"query": "Question: What melts?", "choices": ["snow", "a road", "a wall"], "gold": 0},
    ],
    "hellaswag.jsonl": [
        {"query": "Baking: She warms the oven. She", "choices": ["puts in the bread.", "goes to swim."], "gold": 0},
        {"query": "Sailing: He sets the sail. He", "choices": ["cuts his hair.", "leaves the bay."], "gold": 1},
    ],
    "piqa.jsonl": [
        {"query": "Question: open a jar\n", "choices": ["turn the lid", "paint the lid"], "gold": 0},
        {"query": "Question: dry a cup\n", "choices": ["fill it", "wipe it"], "gold": 1},
    ],
    "siqa.jsonl": [
        {
            "query": "Context: Ann fell.\nQuestion: How is Ann?\nChoices:\nA. hurt\nB. tall\nAnswer:",
            "choices": ["A", "B"],
            "gold": 0,
        },
        {
            "query": "Context: Bob won.\nQuestion: How is Bob?\nChoices:\nA. sad\nB. glad\nAnswer:",
            "choices": ["A", "B"],
            "gold": 1,
        },
    ],
    "winogrande.jsonl": [
        {
            "context_options": ["The cup held tea as the cup", "The cup held tea as tea"],
            "continuation": "was a pot.",
            "gold": 0,
        },
        {"context_options": ["Ann paid Bob so Ann", "Ann paid Bob so Bob"], "continuation": "was richer.", "gold": 1},
    ],
    "lambada_openai.jsonl": [
        {"context": "He saw the dog, and then he fed the", "continuation": "dog"},
        {"context": "It was the end of the", "continuation": "day"},
    ],
    "qasper.jsonl": [
        {"title": "On Rain", "abstract": "We look at rain.", "question": "Is it wet?", "answer": "yes"},
        {"title": "On Sand", "abstract": "We look at sand.", "question": "Is it wet?", "answer": "no"},
    ],
    "math.jsonl": [
        {
            "context": f"What is ${n}+{n}$?",
            "chain_of_thought": f"It is $\\boxed{{{2 * n}}}$.",
            "answer": str(2 * n),
            "category": category,
        }
        for n, category in enumerate(
            [
                "algebra",
                "counting_and_probability",
                "geometry",
                "intermediate_algebra",
                "number_theory",
                "prealgebra",
                "precalculus",
                "algebra",
            ]
        )
    ],
}

# The first row of each of the above, as the hub has it.
HUB: dict[str, dict[str, Any]] = {
    "arc_easy.jsonl": {
        "question": "What is ice?",
        "choices": {"text": ["frozen water", "a stone", "hot air"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    "arc_challenge.jsonl": {
        "question": "Why is it dark?",
        "choices": {"text": ["the sun is down", "it is late"], "label": ["1", "2"]},
        "answerKey": "1",
    },
    "hellaswag.jsonl": {
        "activity_label": "Baking",
        "ctx_a": "She warms the oven.",
        "ctx_b": "she",
        "endings": ["[step] puts in the bread.", "goes to swim."],
        "label": "0",
    },
    "piqa.jsonl": {"goal": "open a jar", "sol1": "turn the lid", "sol2": "paint the lid", "label": 0},
    "siqa.jsonl": {
        "context": "Ann fell.",
        "question": "How is Ann?",
        "answerA": "hurt",
        "answerB": "tall",
        "answerC": "old",
        "label": "1",
    },
    "winogrande.jsonl": {
        "sentence": "The cup held tea as _ was a pot.",
        "option1": "the cup",
        "option2": "tea",
        "answer": "1",
    },
    "lambada_openai.jsonl": {"text": "He saw the dog, and then he fed the dog"},
    "qasper.jsonl": {
        "title": "On Rain",
        "abstract": "We look at rain.",
        "qas": {
            "question": ["Is it wet?", "Where?"],
            "answers": [
                {"answer": [{"unanswerable": False, "yes_no": True}, {"unanswerable": True, "yes_no": None}]},
                {"answer": [{"unanswerable": False, "yes_no": None}]},
            ],
        },
    },
    "math.jsonl": {"problem": "What is $0+0$?", "solution": "It is $\\boxed{0}$."},
}


def write_tasks(folder: Path, **replaced: list[dict[str, Any]]) -> Path:
    """Write every file of LOCAL into `folder`; `arc_easy=[...]` replaces a file's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in LOCAL.items():
        rows = replaced.get(name.removesuffix(".jsonl"), rows)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
