"""Answers of an OpenAI-compatible server (vLLM, `transformers serve`, ...): many requests at a time, none lost."""

import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from http.client import HTTPException

from trl_dynamics.probing.generate import Answer, Failure, Request

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "OPENAI_API_KEY"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
_RETRIED_STATUSES = frozenset({408, 409, 425, 429})


class ServerUnreachable(ValueError):
    """The server cannot be reached, or refuses everyone; answers that arrived before are kept."""


class _NotYet(Exception):
    """An attempt that may succeed when it is repeated, and the pause that the server asked for."""

    def __init__(self, reason: str, pause: float | None = None, unreachable: bool = False):
        super().__init__(reason)
        self.pause, self.unreachable = pause, unreachable


class OpenAIServer:
    """Chat completions over HTTP.

    Rate limits, time-outs, server errors and malformed answers are tried again with growing pauses (`Retry-After` is
    honoured); a request that the server calls invalid is a [`Failure`] at once; a server that is gone, or that refuses
    the key or the model, stops the work with [`ServerUnreachable`].

    Args:
        base_url (`str`): Such as `http://localhost:8000/v1`.
        model (`str`): Name of the model on that server.
        api_key (`str`, *optional*): By default the environment variable OPENAI_API_KEY, if it is set.
        concurrency (`int`, *optional*): Requests under way at a time.
        timeout (`float`, *optional*): Seconds without a byte after which an attempt is given up.
        max_retries (`int`, *optional*): Attempts after the first one.
        requests_per_minute (`float`, *optional*): Rate limit over all attempts.
        options (`Mapping`, *optional*): Added to the body of every request, such as `{"reasoning_effort": "low"}`.
    """

    is_chat = True

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 5,
        requests_per_minute: float | None = None,
        options: Mapping | None = None,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"server URL {base_url!r} begins with neither http:// nor https://")
        if not model:
            raise ValueError(f"no model named for the server {base_url!r}; pass --rephraser_model NAME")
        if concurrency < 1 or max_retries < 0 or timeout <= 0:
            raise ValueError(
                f"concurrency {concurrency}, max_retries {max_retries}, timeout {timeout}: expected at least 1, at "
                "least 0 and more than 0 seconds"
            )
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise ValueError(f"requests_per_minute is {requests_per_minute}, expected more than 0 or no limit")
        self.url, self.model = base_url.rstrip("/") + "/chat/completions", model
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.options = dict(options or {})
        # The address is left out: the same model behind another port gives the same answers.
        self.label = self.name = json.dumps([model, self.options]) if self.options else model
        self._api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        self._pacer = _Pacer(requests_per_minute)
        self._stopped = threading.Event()

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer | Failure]]:
        """Answer requests as their answers arrive, at most `concurrency` at a time.

        Raises:
            ServerUnreachable: After every answer that did arrive has been yielded; so does an interruption.
        """
        self._stopped.clear()
        waiting = iter(requests)
        running: dict = {}
        stop: BaseException | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while True:
                    while stop is None and len(running) < self.concurrency:
                        request = next(waiting, None)
                        if request is None:
                            break
                        running[pool.submit(self._answer, request)] = request
                    if not running:
                        break
                    try:
                        done = wait(running, return_when=FIRST_COMPLETED).done
                    except KeyboardInterrupt as error:
                        if stop is not None:
                            raise
                        logger.warning("stopping; %d requests are still under way", len(running))
                        stop, done = error, ()
                        self._stopped.set()
                    for future in done:
                        request = running.pop(future)
                        try:
                            yield request, future.result()
                        except ServerUnreachable as error:
                            stop = stop or error
                            self._stopped.set()
            finally:
                self._stopped.set()
        if stop is not None:
            raise stop

    def _answer(self, request: Request) -> Answer | Failure:
        for attempt in range(self.max_retries + 1):
            self._pacer.wait(self._stopped)
            try:
                return self._attempt(request)
            except _NotYet as error:
                reason = error
            if self._stopped.is_set():
                break
            if attempt < self.max_retries:
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0)
                logger.debug("attempt %d failed: %s", attempt + 1, reason)
                self._stopped.wait(pause if reason.pause is None else reason.pause)
        if reason.unreachable:
            raise ServerUnreachable(f"the server at {self.url} cannot be reached ({reason}); start it and run again")
        return Failure(f"{reason}, {attempt + 1} attempts")

    def _attempt(self, request: Request) -> Answer | Failure:
        try:
            with urllib.request.urlopen(self._http_request(request), timeout=self.timeout) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            return self._refused(error)
        except TimeoutError as error:
            raise _NotYet(f"no answer within {self.timeout:g} s") from error
        except urllib.error.URLError as error:
            raise _NotYet(str(error.reason), unreachable=True) from error
        except (ConnectionError, HTTPException) as error:
            raise _NotYet(f"the connection broke: {error!r:.80}", unreachable=True) from error
        return _read_answer(body)

    def _http_request(self, request: Request) -> urllib.request.Request:
        sampling, prompt = request.sampling, request.prompt
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        body = {
            "model": self.model,
            "messages": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        } | ({"stop": list(sampling.stop)} if sampling.stop else {})
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        return urllib.request.Request(self.url, json.dumps(body | self.options).encode(), headers)

    def _refused(self, error: urllib.error.HTTPError) -> Failure:
        said = _error_text(error)
        if error.code in (401, 403):
            raise ServerUnreachable(
                f"the server at {self.url} refused the API key ({error.code}: {said}); set {API_KEY_VARIABLE}"
            ) from error
        if error.code == 404:
            raise ServerUnreachable(
                f"the server at {self.url} knows no such address or model (404: {said}); check the URL, which ends in "
                f"/v1 for most servers, and the model's name {self.model!r}"
            ) from error
        if error.code in _RETRIED_STATUSES or error.code >= 500:
            raise _NotYet(f"status {error.code}: {said}", _retry_after(error.headers)) from error
        return Failure(f"status {error.code}: {said}")


class _Pacer:
    """Lets at most so many calls a minute pass, evenly spaced."""

    def __init__(self, per_minute: float | None):
        self.interval = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self, stopped: threading.Event) -> None:
        """Until it is this call's turn, or until the work is stopped."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self.interval
        if turn > now:
            stopped.wait(turn - now)


def _read_answer(body: bytes) -> Answer:
    try:
        choice = json.loads(body)["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        refusal, text = message.get("refusal"), message.get("content")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _NotYet(f"the answer is not a chat completion: {body[:80]!r}") from error
    if refusal or finish == "content_filter":
        return Answer(refusal if isinstance(refusal, str) else text or "", "refusal")
    if text is not None and not isinstance(text, str):
        raise _NotYet(f"the answer's content is no text: {body[:80]!r}")
    return Answer((text or "").strip(), "length" if finish == "length" else "stop")


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        body = error.read().decode("utf-8", "replace")
    except (OSError, HTTPException):
        return error.reason
    try:
        found = json.loads(body)
        found = found.get("error", found.get("detail", found.get("message", body)))
        body = found.get("message", str(found)) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        pass
    return " ".join(body.split())[:200] or error.reason


def _retry_after(headers) -> float | None:
    value = headers.get("Retry-After")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(LONGEST_PAUSE, max(0.0, seconds))
