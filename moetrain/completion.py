"""`moetrain completion SHELL`: what a shell needs to complete verbs, settings and presets.

`source <(moetrain completion bash)`, or `zsh`, in the shell's own start file.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import get_type_hints

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.command import config_dir
from moetrain.exit_codes import BAD_CONFIGURATION, DONE
from moetrain.settings import Config
from moetrain.verbs import VERBS

_SHELLS = ("bash", "zsh")
# bash splits words at `=`: the choice after it is completed by itself.
_SCRIPT = """\
_moetrain() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local group="$before" known="{settings} {groups}"
  if [[ $word == "=" ]]; then
    word=""
  elif [[ $before == "=" ]]; then
    group="${{COMP_WORDS[COMP_CWORD-2]}}"
  fi
  case "${{group#+}}" in
{choices}
    data) known="build inspect" ;;
    *) [[ $COMP_CWORD == 1 ]] && known="{verbs} $known" ;;
  esac
  COMPREPLY=($(compgen -W "$known" -- "$word"))
  [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}}
complete -F _moetrain moetrain
"""


def settings_of(tree: type) -> Iterator[str]:
    """Yields the names of all settings of a tree, with the parts that they are in."""
    kinds = get_type_hints(tree)
    for field in dataclasses.fields(tree):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from (f"{field.name}.{name}" for name in settings_of(kind))
        else:
            yield field.name


def script(shell: str) -> str:
    """Returns what a shell is to read."""
    files = sorted(config_dir().glob("*/*.yaml"))
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(file.parent.name, []).append(file.stem)
    text = _SCRIPT.format(
        settings=" ".join(f"{name}=" for name in settings_of(Config)),
        groups=" ".join(f"+{group}=" for group in groups),
        choices="\n".join(
            f'    {group}) [[ $before == "=" || ${{COMP_WORDS[COMP_CWORD]}} == "=" ]] && '
            f'known="{" ".join(names)}" ;;'
            for group, names in groups.items()
            if group != "data"
        ),
        verbs=" ".join(dict.fromkeys(verb.split()[0] for verb in VERBS)),
    )
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def main(words: list[str]) -> int:
    """Prints the script of a shell; returns the exit code."""
    if len(words) != 1 or words[0] not in _SHELLS:
        given = " ".join(words) or "nothing"
        print(f"moetrain completion: takes bash or zsh, not {given}", file=sys.stderr)
        return BAD_CONFIGURATION
    print(script(words[0]), end="")
    return DONE


if __name__ == "__main__":
    ignore_broken_pipes()
    raise SystemExit(main(sys.argv[1:]))
