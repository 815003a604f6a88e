"""The commands and options of ``fastrnn``: the parser alone, which imports no torch, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap

from .config import TrainConfig, parse_duration

COMMANDS = {
    "demo": "train, sample and race a small model in under a minute",
    "train": "train a language model on a text file",
    "generate": "write text with a trained model",
    "score": "how probable a model finds a text: nll, perplexity, bits per character",
    "bench": "measure speed against other implementations (in a source checkout)",
    "info": "this machine, what was built, and which backend each op would run on",
    "recipe": "run one of the five tutorials",
}

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
RECIPES = ("000", "001", "002", "003", "004")


class UsageError(ValueError):
    """The command line asks for something that cannot be; exit code 2."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``command`` is the name of the chosen one."""
    parser = argparse.ArgumentParser(
        prog="fastrnn",
        description="Recurrent networks that run at the speed of the hardware: train, generate, score.",
        epilog="`fastrnn COMMAND --help` tells a command's options. Text goes to stdout, all else to stderr.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        globals()[f"_{name}_options"](command)
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error (or set FASTRNN_DEBUG=1)"
        )
        command.set_defaults(parser=command)
    return parser


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", default="fastrnn-demo", help="folder for the model and the names (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a test of the installation")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (%(default)s)")


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = textwrap.dedent("""\
        examples:
          fastrnn train shakespeare.txt -o shakespeare --max-time 10m --sample-every 200
          fastrnn train unicode-names -o names --hidden-size 160 --max-steps 2000
          fastrnn train shakespeare.txt -o shakespeare --resume --max-time 20m
        A --config file holds the same options by name (hidden_size = 256, max_time = "10m"); the command line wins.""")
    parser.add_argument("file", metavar="FILE", nargs="?",
                        help="a text file, an AG News .csv, '-', or unicode-names, python-docs or news "
                        "(with --resume: as before unless given)")  # fmt: skip
    parser.add_argument("-o", "--out", help="folder for the model, its checkpoint and metrics.jsonl")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder, bit for bit")
    parser.add_argument("--config", metavar="TOML", help="file with options by name")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto = cuda where there is one")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--plot", metavar="IMAGE", help="draw the losses into this .png or .svg at the end")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    text = parser.add_argument_group("text")
    _option(text, "encoding", str, "encoding of the file", "utf-8")
    _option(text, "limit", int, "use the first so many documents, or characters of a text", None)
    _option(text, "tokens", str, "what a token is", "char", ("char", "byte", "word", "regex", "bpe"))
    _option(text, "vocab_size", int, "largest vocabulary (word, regex, bpe)", None)
    _option(text, "min_count", int, "rarer pieces become unknown", 1)
    _option(text, "pattern", str, "regular expression of one token (regex)", None)
    text.add_argument("--lowercase", action="store_true", default=argparse.SUPPRESS, help="lower-case the text")
    network = parser.add_argument_group("network")
    _option(network, "input", str, "how a token enters", "embedding", ("embedding", "onehot", "scalar"))
    _option(network, "embedding_dim", int, "size of the embedding (default: hidden size)", None)
    _option(network, "cell", str, "recurrent cell", "lstm", CELLS)
    _option(network, "hidden_size", int, "units of a layer", 128)
    _option(network, "num_layers", int, "layers", 1)
    _option(network, "dropout", float, "dropout between layers and before the head", 0.0)
    _option(network, "head", str, "predict after every step, or after the last of a window", "all", ("all", "last"))
    _option(
        network, "state", str, "generate with the state carried on, or from a window", "carried", ("carried", "window")
    )
    _option(network, "window", int, "tokens of the window (default: seq_len)", None)
    network.add_argument("--tie-weights", action="store_true", default=argparse.SUPPRESS,
                         help="the head shares the embedding's matrix")  # fmt: skip
    training = parser.add_argument_group("training")
    for field in dataclasses.fields(TrainConfig):
        kind = {"int": int, "float": float, "str": str}[str(field.type).split(" ")[0]]
        default = "stream, or lines for a list" if field.name == "batching" else field.default
        _option(training, field.name, _duration if field.name == "max_time" else kind, field.metadata["help"], default,
                field.metadata["choices"])  # fmt: skip


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def _option(
    group: argparse._ArgumentGroup, name: str, kind: object, text: str, default: object,
    choices: tuple[str, ...] | None = None,
) -> None:  # fmt: skip
    """An option that is absent from the namespace unless given, so that a file or a checkpoint can supply it."""
    shown = "" if default is None or "default" in text else f" ({default})"
    metavar = None if choices else {int: "N", float: "X", str: "TEXT"}.get(kind, "TIME")
    group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, choices=choices, metavar=metavar,
                       default=argparse.SUPPRESS, help=(text + shown).replace("%", "%%"))  # fmt: skip


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = textwrap.dedent("""\
        input lines, in any mixture:
          {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 20}}
          {"prompt": "Once", "temperature": 0.7}
          Once upon a time
        Output lines come in the order of the input. Running again appends only what is missing. The tokens of a line
        depend on the model, the seed and the line's number, not on shards, batch size or neighbours.

        examples:
          fastrnn generate shakespeare -p "ROMEO:" --max-new-tokens 500
          fastrnn generate names -i prompts.jsonl -o out.jsonl --temperature 0.7
          head prompts.txt | fastrnn generate names -i - -o - | jq .text""")
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="continue this text, streaming to stdout")
    source.add_argument("-i", "--input", metavar="FILE", help="requests, one a line; '-' is stdin")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="-", help="where results of -i go, one JSON a line; '-' is stdout"
    )
    sampling = parser.add_argument_group("sampling (a line of -i may set its own)")
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens to write (%(default)s)")
    sampling.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0 = always the most probable (%(default)s)"
    )
    sampling.add_argument("--top-k", type=int, default=0, metavar="N", help="draw among the N most probable; 0 = off")
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="draw among the most probable that sum to X"
    )
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="drop tokens below X times the most probable"
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 discourages repeats"
    )
    sampling.add_argument("-n", "--n", type=int, default=1, metavar="N", help="results per prompt (%(default)s)")
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (%(default)s)")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument(
        "--unk", choices=("error", "skip"), default="error", help="characters the model does not know (%(default)s)"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "int8"), default="float32",
        help="of the weights: fewer bits are faster; what they cost in bits a token is printed (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--logprobs", action="store_true", help="add each token's log-probability")
    parser.add_argument("--nll", action="store_true", help="add the sum of the negative log-probabilities")
    parser.add_argument("--json", action="store_true", help="with -p: one JSON object instead of text")
    parser.add_argument("--shard", metavar="I/N", help="do every N-th line, from line I (0-based); torchrun sets it")
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences at once")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto = cuda where there is one")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")


def _score_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument("file", metavar="FILE", help="a UTF-8 text; '-' is stdin")
    parser.add_argument("--lines", action="store_true", help="score each line as a text of its own")
    parser.add_argument(
        "--unk", choices=("error", "skip"), default="error", help="characters the model does not know (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object (with --lines: one a line)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto = cuda where there is one")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="a script of bench/, such as sample; none lists them")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of that script")


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", choices=RECIPES, help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
    parser.add_argument("--as-written", action="store_true", help="with the tutorial's own sizes and steps")
    parser.add_argument("--data", metavar="PATH", help="a text, or for 004 AG News' .csv, in place of the built-in one")
    parser.add_argument("-o", "--out", help="folder for the model, its metrics and samples.txt")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and draws (0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto = cuda where there is one")
