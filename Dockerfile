# fabricrl in a container:
#
#   docker build --tag fabricrl .
#   docker run --rm --volume "$PWD/logs:/fabricrl/logs" fabricrl fabricrl/algos/ppo/ppo.py --env-id CartPole-v1
#
# See docs/running.md, also for an image without CUDA, which is some gigabytes smaller.
FROM python:3.12-slim

# A C++ compiler for --compile, and what MuJoCo draws with where there is no screen
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libegl1 libgl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*
ENV MUJOCO_GL=egl PYTHONUNBUFFERED=1

WORKDIR /fabricrl
ARG PIP_EXTRA_INDEX_URL=""
ARG TORCH="torch==2.13.0"
ARG EXTRAS="box2d,mujoco"
RUN pip install --no-cache-dir "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY fabricrl fabricrl
RUN pip install --no-cache-dir --editable ".[$EXTRAS]"
COPY examples examples

# No shell and no init between: the script is process 1, hears `docker stop`, and ends with a checkpoint
ENTRYPOINT ["python"]
CMD ["fabricrl/algos/ppo/ppo.py", "--env-id", "CartPole-v1"]
