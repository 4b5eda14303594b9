#!/bin/bash
# Stage one: every teacher over every case, one part of the cases for each element of the array.
#SBATCH --job-name={{name}} --output={{log}}
#SBATCH --requeue --open-mode=append --signal=USR1@{{signal_seconds}}
{{directives}}

{{prologue}}
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over by itself
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# A signal ends the command like a kill: the unit in flight is lost, and made again.
srun {{command}} \
  --num-parts {{num_parts}} --part-id "$SLURM_ARRAY_TASK_ID"
code=$?

# Put back if it was killed. Code 1 names the units that failed, 2 is for people to mend.
if [ $code -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt {{num_restarts}} ]; then
  scontrol requeue "$job"
fi
exit $code
