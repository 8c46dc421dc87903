# shellcheck shell=bash
# Sourced by the launchers: one way to read arguments, to complain, and to run or show.
#
#   parse "zone= spot" "$@"   reads --zone=X and --spot into OPTION, what belongs to the
#                             program into PROGRAM, and --dry-run into OPTION[dry-run]
#   run gcloud ...            runs a command, or prints it where --dry-run was given

declare -A OPTION=()
PROGRAM=()
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# The comment at the head of a launcher is its --help.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
}

parse() {
  local known=" $1 dry-run " argument name
  shift
  for argument in "$@"; do
    name=${argument#--}
    name=${name%%=*}
    case $argument in
      --help | -h) usage && exit 0 ;;
      --config=* | --config.* | --noconfig.* | --workdir=* | --mode=* | --profile=* | --distributed.*=*)
        PROGRAM+=("$argument")
        ;;
      --*=*)
        [[ $known == *" $name= "* ]] || fail "there is no option --$name; see --help"
        OPTION[$name]=${argument#*=}
        ;;
      --*)
        [[ $known == *" $name= "* ]] && fail "--$name needs a value: --$name=..."
        [[ $known == *" $name "* ]] || fail "there is no option --$name; see --help"
        OPTION[$name]=1
        ;;
      *) fail "$argument is no option; every argument is --NAME or --NAME=VALUE" ;;
    esac
  done
}

# Prints the value of an argument of the program, the last one given, or nothing.
of_program() {
  local argument value=""
  for argument in "${PROGRAM[@]}"; do
    if [[ $argument == "--$1="* ]]; then value=${argument#*=}; fi
  done
  printf '%s' "$value"
}

# Prints the value of --workdir with its "~" spelt out, as the program does: bash does not
# after a "=".
workdir_of_program() {
  local workdir home
  workdir=$(of_program workdir)
  if [[ $workdir =~ ^(~([A-Za-z_][A-Za-z0-9_.-]*)?)(/|$) ]]; then
    eval "home=${BASH_REMATCH[1]}" # a name and nothing else
    workdir=$home${workdir#"${BASH_REMATCH[1]}"}
  fi
  printf '%s' "$workdir"
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${OPTION[$name]:-} ]] || fail "--$name=... is missing; see --help"
  done
}

# whole LEAST NAME...: these options are whole numbers, where they are given.
whole() {
  local least=$1 name value
  shift
  for name in "$@"; do
    value=${OPTION[$name]:-$least}
    if [[ ! $value =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((value < least)); then
      fail "--$name=$value is not a whole number >= $least"
    fi
  done
}

# What is wrong with --config and --workdir is said before anything is rented.
check_program() {
  local config workdir
  config=$(of_program config)
  workdir=$(of_program workdir)
  [[ -n $config ]] || fail "--config=FILE is missing, for example configs/quickstart.py"
  [[ -f $REPOSITORY/${config%%:*} ]] ||
    fail "there is no ${config%%:*} in the repository; name it from its root"
  [[ -n $workdir ]] || fail "--workdir=DIR is missing: a folder every host can see"
  [[ $workdir != *://* ]] ||
    fail "--workdir=$workdir is no path; mount a shared file system and name its folder"
}

tool() {
  [[ -n ${OPTION[dry-run]:-} ]] || command -v "$1" >/dev/null ||
    fail "$1 is not installed ($2); --dry-run shows the commands without it"
}

# A command as it could be pasted into a shell.
quoted() {
  local text="" argument
  for argument in "$@"; do
    [[ $argument =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || argument=${argument@Q}
    text+=" $argument"
  done
  printf '%s' "${text# }"
}

run() {
  if [[ -n ${OPTION[dry-run]:-} ]]; then
    quoted "$@" && echo
  else
    "$@"
  fi
}

# A remark between the commands of a dry run.
remark() {
  [[ -z ${OPTION[dry-run]:-} ]] || echo "# $*"
}
