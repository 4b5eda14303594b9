#!/bin/bash
# Stage two: the student, in one process for each task.
#SBATCH --job-name={{name}} --output={{log}}
#SBATCH --requeue --open-mode=append --signal=USR1@{{signal_seconds}}
{{directives}}

{{prologue}}
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over by itself
: "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_ADDR
run={{run_folder}}
started={{jobs}}/$SLURM_JOB_ID.started
touch "$started"

# Until the command listens to signals they are ignored; then all processes stop after the same
# step and save.
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' bash \
  {{command}}
code=$?

# Exit codes lie. "Finished" is the marker; and a start that came further wrote a checkpoint: it is
# put back. Code 2 is for people to mend, and so is an end before the first checkpoint.
new=$(find "$run"/checkpoints -name 'step_*.pt' -newer "$started" 2>/dev/null)
if [ "$run/finished.json" -nt "$started" ]; then
  code=0
elif [ $code -ne 0 ] && [ $code -ne 2 ] && [ -n "$new" ] \
  && [ "${SLURM_RESTART_COUNT:-0}" -lt {{num_restarts}} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$started"
exit $code
