#!/bin/sh
# Runs train.py under accelerate as a container's first process, and passes on what ends it.
#
# The launcher takes no notice of SIGTERM as the first process, and elsewhere dies of it before train.py has saved its
# checkpoint: so the signal goes to train.py itself, and this waits until it has. Exit code: 143 after a signal (the run
# can be resumed), the launcher's otherwise (0 or 1).
set -u

launcher=
stopped=

# shellcheck disable=SC2317,SC2329 # called by the trap
forward() {
    stopped=yes
    children=$(cat "/proc/$launcher/task/$launcher/children" 2>/dev/null)
    # While the launcher is still starting there are none.
    # shellcheck disable=SC2086 # several numbers
    kill -TERM ${children:-$launcher} 2>/dev/null
}
trap forward TERM INT

accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-/app/accelerate_config.yaml}" /app/train.py "$@" &
launcher=$!
while kill -0 "$launcher" 2>/dev/null; do # a signal ends wait, not the launcher
    wait "$launcher"
    status=$?
done
[ -n "$stopped" ] && exit 143
exit "$status"
