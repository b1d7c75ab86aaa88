"""Our own prompts for the published tasks, used where no clone of a benchmark's repository is given.

They ask for the same, in other words, so that results are of the task but not comparable with published figures; every row
and every report says which wording it had. Fields are those of the published templates.
"""

_PASSAGES = (
    "Below are several passages.\n\n{context}\n\nUsing these passages, reply with the answer alone, in a few words.\n"
    "Q: {input}\nA:"
)
LONGBENCH = {
    "narrativeqa": "Here is a story.\n\n{context}\n\nReply with a short phrase and nothing else.\nQ: {input}\nA:",
    "qasper": (
        "Here is a paper.\n\n{context}\n\nReply briefly from the paper: a phrase, yes or no, or unanswerable if the paper does "
        "not say.\nQ: {input}\nA:"
    ),
    "multifieldqa_en": "Here is a text.\n\n{context}\n\nReply briefly from the text, with the answer alone.\nQ: {input}\nA:",
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": "Here is a government report.\n\n{context}\n\nSum it up on about one page.\n\nSummary:",
    "qmsum": "Here is what was said in a meeting.\n\n{context}\n\nReply in a few sentences.\nRequest: {input}\nReply:",
    "multi_news": "Here are news articles on one event.\n\n{context}\n\nSum all of them up on about one page.\n\nSummary:",
    "trec": "Name the kind of each question, as these examples do.\n\n{context}\n{input}",
    "triviaqa": "Each question is answered from the passage before it, with the answer alone.\n\n{context}\n\n{input}",
    "samsum": "Each conversation is followed by a short summary of it.\n\n{context}\n\n{input}",
    "passage_count": (
        "Some of the numbered paragraphs below are copies of each other.\n\n{context}\n\nHow many different paragraphs are "
        "there? Reply with the number alone.\n\nNumber: "
    ),
    "passage_retrieval_en": (
        "Below are numbered paragraphs.\n\n{context}\n\nOne of them is summed up here:\n\n{input}\n\nReply with its name, such "
        "as Paragraph 7.\n\nName: "
    ),
    "lcc": "Continue this program with its next line.\n{context}Next line:\n",
    "repobench-p": "Continue this program with its next line.\n{context}{input}Next line:\n",
}
_CHOICE = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n\nThe right letter is"
INFINITEBENCH = {
    "passkey": "Somewhere in this long text a pass key is mentioned. Remember it.\n\n{context}\n\n{input}\n\nIts digits are",
    "number_string": "Somewhere in this long text a string of digits is mentioned.\n\n{context}\n\n{input}\n\nIts digits are",
    "kv_retrieval": "Here is a JSON object; find the value of one of its keys.\n\n{context}\n\n{input}",
    "longbook_sum_eng": "Here is a book.\n\n{context}\n\nIn short, this happens in it:",
    "longbook_choice_eng": "Here is a book.\n\n{context}\n\nQ: {question}\n" + _CHOICE,
    "longbook_qa_eng": "Here is a book.\n\n{context}\n\nReply as briefly as you can.\nQ: {question}\nA:",
    "longbook_qa_chn": "下面是一本书。\n\n{context}\n\n请用最少的字作答。\n提问：{question}\n回答：",
    "math_find": "{prefix}\n\n{context}\n\n{input}",
    "math_calc": (
        "Sums are worked out step by step, one intermediate result after the other.\n\n2 + 5 - 3\n[2, 7, 4]\n\n"
        "9 - 4 + 1 - 2\n[9, 5, 6, 4]\n\n{context}\n"
    ),
    "code_run": "Read this Python program, above all its function {func}.\n\n{context}\n\nThe value of {func_call} is",
    "code_debug": "One function of this Python program has been broken on purpose.\n\n{context}\n\nWhich?\n" + _CHOICE,
    "longdialogue_qa_eng": (
        "In this script one mention of a character's name is covered by $$MASK$$.\n\n{context}\n\nThe covered name is probably"
    ),
}
NEEDLE = {
    "needle": "\nThe finest way to spend an evening in Lisbon is to ride the old yellow tram up to the castle at dusk.\n",
    "retrieval_question": "The finest way to spend an evening in Lisbon is",
    "prompt": "Here is a long book: <book> {context} </book>.\nGoing by the book: {retrieval_question}\nAnswer:",
}
