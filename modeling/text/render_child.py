"""The process that renders one chat template; modeling/text/renderer.py starts it, and is its only user.

    python -ISB render_child.py FOLDER...     folders to import jinja2 from, after the standard library

All is said in lines of JSON. On stdin the template's source comes first, and then two lines for every request, its limits and
the template's variables:

    {"ask": "text" or "names", "now": [year, ..., microsecond], "seconds": number, "bytes": number, "characters": number}
    {...}

to which one line on stdout is the answer:

    {"text": text}, {"names": [...]}, {"error": line} or {"exceeded": "bytes" or "characters"}

A template is a stranger's program. More processor time than `seconds` ends the process (SIGPROF), even in the middle of one
operation of the interpreter; memory beyond `bytes` cannot be had, and whoever could not have it is not relied on again.
"""

import datetime
import json
import os
import resource
import signal
import sys

LONGEST_ERROR = 300  # characters


def main(folders: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whoever started us may have had it ignored or blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path += folders
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    template = Template(json.loads(requests.readline()))
    while line := requests.readline():
        try:
            answer = template.answer(json.loads(line), requests.readline())
        except MemoryError:  # nothing may be had to say so with, and what is half done stays so
            os.write(answers.fileno(), b'{"exceeded": "bytes"}\n')
            return
        answers.write(answer + b"\n")
        answers.flush()


class Template:
    """A template's source, compiled when it is first asked for its text: compiling computes what is constant in it."""

    def __init__(self, source: str) -> None:
        import jinja2
        import jinja2.ext
        import jinja2.meta
        import jinja2.sandbox

        class GenerationTag(jinja2.ext.Extension):
            """{% generation %} ... {% endgeneration %}, a mark for training that renders as its body."""

            tags = {"generation"}  # noqa: RUF012 - jinja2 asks for this attribute

            def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.Scope(body, lineno=line)

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        self._source = source
        self._undeclared = jinja2.meta.find_undeclared_variables
        self._compiled: jinja2.Template | None = None
        self._now = datetime.datetime.min
        self._environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        self._environment.filters["tojson"] = to_json
        self._environment.globals["raise_exception"] = raise_exception
        self._environment.globals["strftime_now"] = lambda form: self._now.strftime(form)

    def answer(self, request: dict, variables: bytes) -> bytes:
        """The answer to a request, under its limits."""
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        room = request["bytes"] if most == resource.RLIM_INFINITY else min(request["bytes"], most)
        resource.setrlimit(resource.RLIMIT_AS, (room, most))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            answer = self._names() if request["ask"] == "names" else self._text(request, json.loads(variables))
        except MemoryError:
            raise
        except Exception as error:
            words = str(error)[: 10 * LONGEST_ERROR].split()
            answer = {"error": " ".join(words)[:LONGEST_ERROR] or type(error).__name__}
        encoded = json.dumps(answer).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        return encoded

    def _names(self) -> dict[str, object]:
        return {"names": sorted(self._undeclared(self._environment.parse(self._source)))}

    def _text(self, request: dict, variables: dict) -> dict[str, object]:
        self._now = datetime.datetime(*request["now"])
        if self._compiled is None:
            self._compiled = self._environment.from_string(self._source)
        pieces, left = [], request["characters"]
        for piece in self._compiled.generate(variables):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                return {"exceeded": "characters"}
        return {"text": "".join(pieces)}


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: "int | None" = None,
    separators: "tuple[str, str] | None" = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which a model has not seen in training."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main(sys.argv[1:])
