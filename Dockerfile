# The two commands of README.md's "Install" in a container. Only its steps were run, one by one: no container was built.
#   docker build -t mhmoe . && docker run --rm -v "$PWD/data:/mhmoe_fairseq/data" mhmoe mhmoe doctor
FROM python:3.11-bookworm
WORKDIR /mhmoe_fairseq
COPY . .
ENV EXTRAS=plots,tensorboard,hf PIP_NO_CACHE_DIR=1
RUN make setup PYTHON=python3.11
ENV PATH=/mhmoe_fairseq/.venv/3.11/bin:$PATH
CMD ["mhmoe", "--help"]
