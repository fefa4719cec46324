"""The command line. Each command is a dataclass in `cluster.commands`, loaded only when it is asked for."""

import io
import json
import os
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from keyword import iskeyword
from pathlib import Path
from typing import Any, get_args

COMMANDS = {
    "demo": ("Demo", "the whole story on the embedded speech, ending with a page to open"),
    "cache": ("Cache", "run Whisper over a dataset and keep activations in a store"),
    "transcribe": ("Transcribe", "write down what Whisper hears, with times, as a dataset for 'cache'"),
    "info": ("Info", "what a store holds"),
    "verify": ("Verify", "read all of a store and name what is damaged"),
    "repair": ("Repair", "drop what is damaged, so that 'hearsae cache' makes it again"),
    "align": ("Align", "find when each word and phone of a store is spoken"),
    "train": ("Train", "train sparse autoencoders on stored activations"),
    "evaluate": ("Evaluate", "L0, FVU, dead latents, density of trained SAEs on a store"),
    "scan": ("Scan", "find the moments that drive every neuron, SAE latent or basis direction"),
    "phones": ("Phones", "which phone each feature follows, and what it responds to at lower activation"),
    "query": ("Query", "ask: features, moments, phones, words, moments like one, SQL"),
    "export": ("Export", "write a trained SAE for SAELens, dictionary_learning or sparsify"),
    "import": ("Import", "read an SAE of SAELens, dictionary_learning or sparsify"),
    "push": ("Push", "upload a trained SAE with a model card to the Hugging Face Hub, or a folder"),
    "pull": ("Pull", "download an SAE from there"),
    "explore": ("Explore", "write scans as a page to look at and listen to, or serve it and hear sound live"),
    "experiment": ("", "the published experiments on a Whisper, each with its report"),
    "submit": ("Submit", "run any of these as a job on a Ray cluster"),
    "jobs": ("Jobs", "list the jobs of a Ray cluster; status, logs, stop"),
}
EXPERIMENTS = {
    "post": ("Post", 'the whole of "Interpreting Whisper", section by section, in one report'),
    "attention": ("Attention", "how local the encoder's attention is, and which positions an output comes from"),
    "window": ("Window", "how far the encoder must see: error rates against the reach of its attention"),
    "chop": ("Chop", "where a word is: transcripts without some of the encoder's frames"),
    "bigrams": ("Bigrams", "what the decoder expects next when it hears nothing"),
    "neighbours": ("Neighbours", "whether words with similar embeddings sound or mean alike"),
    "steer": ("Steer", "what is written when features are scaled, set, added to or limited"),
    "sonify": ("Sonify", "the sound that excites a feature most, found by gradient ascent"),
    "ablate": ("Ablate", "what is lost without features, or without a site; a ranking of features"),
    "erase": ("Erase", "how many features carry a concept: sparse probes, and erasing it, on held-out speakers"),
    "hallucination": ("Hallucination", "what is written where nobody speaks, and whether steered features stop it"),
}
"""What `hearsae experiment` takes next."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 with one line on stderr, or 2 for wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"hearsae {version('hearsae')}")
        return 0
    if arguments[0] == "experiment" and (len(arguments) < 2 or arguments[1] in ("-h", "--help", "help")):
        print(_experiments_help())
        return 0 if len(arguments) > 1 else 2
    name, options = split_name(arguments)
    if unknown := no_such(name):
        print(f"hearsae: {unknown}", file=sys.stderr)
        return 2
    return _run(name, options)


def split_name(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """A command line -> (what it runs, its options): `experiment` and what follows it are one name."""
    words = 2 if arguments[0] == "experiment" else 1
    return " ".join(arguments[:words]), list(arguments[words:])


def no_such(name: str) -> str:
    """What is wrong with a name of `split_name`; empty where there is such a command."""
    of, _, experiment = name.partition(" ")
    if of not in COMMANDS:
        return f"there is no command '{of}'; the commands are: {', '.join(COMMANDS)}"
    if of == "experiment" and experiment not in EXPERIMENTS:
        return f"there is no experiment '{experiment}'; the experiments are: {', '.join(EXPERIMENTS)}"
    return ""


def _help() -> str:
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    head = ["usage: hearsae COMMAND [options]", "", "What a speech model has learnt.", "", "commands:"]
    return "\n".join([*head, *lines, "", "hearsae COMMAND --help shows its options."])


def _experiments_help() -> str:
    lines = [f"  {name:14} {what}" for name, (_, what) in EXPERIMENTS.items()]
    head = ["usage: hearsae experiment NAME [options]", "", "The published experiments, on any Whisper and any speech. Each writes a report.", ""]
    return "\n".join([*head, "experiments:", *lines, "", "hearsae experiment NAME --help shows its options."])


def _command_class(name: str) -> Any:
    of, _, experiment = name.partition(" ")
    if experiment:
        return getattr(import_module(f"cluster.commands.experiments.{experiment}"), EXPERIMENTS[experiment][0])
    return getattr(import_module(f"cluster.commands.{of}{'_' * iskeyword(of)}"), COMMANDS[of][0])


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The command, from what follows its name. Says what is wrong and exits with 2 where that is wrong usage.

    A class with a field `command` (`submit`) gets what stands after `--` in it, untouched.
    """
    import tyro

    command_class = _command_class(name)
    own, rest = list(arguments), None
    if hasattr(command_class, "command") and "--" in own:
        at = own.index("--")
        own, rest = own[:at], tuple(own[at + 1 :])
    command = tyro.cli(command_class, prog=f"hearsae {name}", args=own, config=(tyro.conf.FlagCreatePairsOff,), registry=_constructors())
    return command if rest is None else replace(command, command=rest)


def _run(name: str, arguments: list[str]) -> int:
    from cache.errors import HearsaeError

    # Before torch is loaded. Threads of its products that wait for each other would keep the cores from whatever else runs on the machine, and
    # from each other: beside one other busy process, two threads train in 248 ms a step if they spin, in 102 if they sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        command = parse(name, arguments)
        result, results = None, _results(command)
        try:
            for result in results:
                print(json.dumps(result, default=str) if command.json else command.summary(result), flush=True)
        except KeyboardInterrupt as interrupt:
            with suppress(StopIteration):
                results.throw(interrupt)  # for what goes on without us, the command has a word of its own
        bad = getattr(command, "complaint", lambda result: None)(result)
        if bad:
            print(f"hearsae: {bad}", file=sys.stderr)
        return getattr(command, "exit_status", lambda result: int(bool(bad)))(result)
    except HearsaeError as error:
        print(f"hearsae: {' '.join(str(error).split())}", file=sys.stderr)  # one line, though a file's name may have several
    except KeyboardInterrupt:
        print("hearsae: interrupted; what was committed stays, and the same command goes on from there", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output left: nothing more to say
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"hearsae: the system refused{where}: {error.strerror or error}", file=sys.stderr)
    return 1


class Aside(io.TextIOBase):
    """Passes on to stderr what is printed, but for what Ray prints of workers that died: hearsae says that in its own words."""

    def write(self, text: str) -> int:
        return len(text) if threading.current_thread().name == "ray_listen_error_messages" else sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _results(command: Any) -> Generator[Any]:
    """What a command has to say: once, or as it goes on where `run` is a generator."""
    with redirect_stdout(Aside()):  # what libraries have to say is not the answer
        result = command.run()
    if not isinstance(result, Generator):
        yield result
        return
    while True:
        with redirect_stdout(Aside()):
            try:
                part = next(result)
            except StopIteration:
                return
        try:
            yield part
        except KeyboardInterrupt as interrupt:
            with suppress(StopIteration):
                result.throw(interrupt)
            return


def _constructors() -> Any:
    """How tyro makes a Location from an argument: as it makes a Path, but that addresses of object stores are told from paths."""
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

    from cache.errors import HearsaeError
    from cache.location import Location, RemotePath, location

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def path(info: PrimitiveTypeInfo) -> Any:
        kinds = set(get_args(info.type) or (info.type,))
        if Path not in kinds or not kinds <= {Path, RemotePath, type(None)}:
            return None

        def parse(arguments: list[str]) -> Location | None:
            if arguments == ["None"] and type(None) in kinds:
                return None
            place = location(arguments[0])
            if not isinstance(place, tuple(kinds)):
                raise HearsaeError(f"'{place}' can't be used there: give a path of this machine")
            return place

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{None}|PATH" if type(None) in kinds else "PATH",
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, tuple(kinds)),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


if __name__ == "__main__":
    sys.exit(main())
