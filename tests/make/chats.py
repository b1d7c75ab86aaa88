"""Things to say in a chat, and templates that put them in words as released models' do."""

from __future__ import annotations

from restkv.chat import Chat
from restkv.results import Generation, Stats
from restkv.session import Session

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Llama 2's: strips what was said, and the system prompt is part of the first user turn.
STRIPPING = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ first if loop.first else '' }}"
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
# As reasoning models': of earlier answers only a remark is left, in capitals.
REWRITING = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.revindex > 2 %}{{ '(FORGOTTEN)\n' }}"
    "{% else %}{{ '<' + m.role + '>' + m.content | upper + '\n' }}{% endif %}{% endfor %}<assistant>"
)
# As Mistral's: the system prompt stands before the newest user turn.
MOVING = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST]{{ system if loop.last else '' }}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "stripping": STRIPPING, "rewriting": REWRITING, "moving": MOVING}
SYSTEM = "Tom is a boy. He has a red kite."
TURNS = ["Once upon a time, there was a girl named Lily.", "  The dog was happy. ", "One day, Tom went to the park"]


def say(chat: Chat, text: str, **options) -> Generation:
    stream = chat.send(text, **{"max_new_tokens": 10} | options)
    for _ in stream:
        pass
    return stream.generation


def session_of(chat: Chat) -> Session:
    """The session of a chat that has begun."""
    assert chat.session is not None
    return chat.session


def stats_of(chat: Chat) -> Stats:
    """The statistics of a chat that has begun."""
    assert chat.stats is not None
    return chat.stats
