/**
 * The web client: the feed as it is now, and a form to write into it.
 *
 * Whatever people wrote goes into the page as text (textContent), never as markup; the server's
 * Content-Security-Policy would refuse anything else. Addresses are relative, so that the page
 * works below a path of a proxy, too.
 */

const PAGE_SIZE = 50;
const SHOWN_MAX = 2000; // while somebody reads older chatts
const SHOWN_AT_END = 500; // while somebody reads the newest
const DELETED_MAX = 1000;
const TOKENS_MAX = 500;
const ATTEMPTS_MAX = 6; // to send one chatt, before the writer is asked
const RETRY_MAX_MS = 30_000;
const REQUEST_MS = 20_000;
const POST_MS = 60_000;
// A connection that broke without a word says nothing, like a quiet one: so it is made anew.
const QUIET_MS = 90_000;
const ARRIVE_MS = 20;
const NEAR_END_PX = 80;
const PICTURE_BOX = [480, 360];

const byId = (id) => document.getElementById(id);
const scroller = byId("scroller");
const feed = byId("feed");

/** What the server said in a problem document (docs/errors.md), or what we say for it. */
class Problem extends Error {
  constructor(status, detail, retryAfterSeconds = 0) {
    super(detail);
    this.status = status;
    this.retryAfterMs = retryAfterSeconds * 1000;
  }

  /** Read the body of an answer that is no success. */
  static of(status, text, retryAfter) {
    let detail;
    try {
      detail = JSON.parse(text).detail;
    } catch {
      // A proxy in between answers in its own words.
    }
    if (typeof detail !== "string") detail = `The server answered with the status ${status}.`;
    return new Problem(status, detail, Number(retryAfter) || 0);
  }

  static unreachable() {
    return new Problem(0, "The server cannot be reached.");
  }
}

/** Ask the server; throws `Problem`. */
async function request(path, options = {}) {
  let response, text;
  try {
    const signal = AbortSignal.timeout(REQUEST_MS);
    response = await fetch(path, { signal, cache: "no-cache", ...options });
    text = await response.text();
  } catch {
    throw Problem.unreachable();
  }
  if (!response.ok) throw Problem.of(response.status, text, response.headers.get("retry-after"));
  try {
    return text && JSON.parse(text);
  } catch {
    // A hotel's page, for example, that wants somebody to log in first.
    throw new Problem(response.status, "Something else than the server has answered.");
  }
}

/** The wait before attempt number `count`: longer each time, and not the same for everybody. */
function backoffMs(count) {
  return Math.min(RETRY_MAX_MS, 1000 * 2 ** count) * (0.5 + Math.random() / 2);
}

// What is kept in this browser. ---------------------------------------------------------------

/** Read what was kept; some browsers and settings keep nothing. */
function recall(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function keep(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // Full or forbidden: what is kept in memory serves until the page is closed.
  }
}

/** The tokens that delete one's own chatts, by id, oldest first. */
const tokens = new Map();

/** Take over what other tabs kept. */
function recallTokens() {
  try {
    for (const [id, token] of JSON.parse(recall("chatterd.tokens"))) tokens.set(id, token);
  } catch {
    // Nothing there yet, or nothing of ours.
  }
}

function changeTokens(change) {
  recallTokens();
  change();
  for (const id of [...tokens.keys()].slice(0, -TOKENS_MAX)) tokens.delete(id);
  keep("chatterd.tokens", JSON.stringify([...tokens]));
}

// The feed. -----------------------------------------------------------------------------------

const items = new Map(); // the elements of the chatts that are shown, by id
const deleted = new Set(); // ids that no page that is still on its way may bring back
let hasOlder = false;
let isAtEnd = true;
let unseenCount = 0;
let listening; // the timer until additions are read out again

/** Make an element with properties; what is undefined is left as it is. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Names in sentences of ours keep their own direction. */
const isolated = (text) => `\u2068${text}\u2069`;
const shortened = (text, length) => (text.length > length ? `${text.slice(0, length)}…` : text);

function chattElement(chatt) {
  const message = chatt.message.replaceAll("\r\n", "\n");
  const item = element("li", { className: "chatt" });
  item.dataset.id = chatt.id;
  item.dataset.time = chatt.time;
  item.chatt = JSON.stringify(chatt);
  const media = element("div", { className: "media" });
  const about = `from ${isolated(shortened(chatt.name, 60))}${message && ": "}${shortened(message, 120)}`;
  if (chatt.image) media.append(pictureElement(chatt.image, about));
  if (chatt.video) media.append(videoElement(chatt.video, about));
  item.append(
    avatarElement(chatt.name),
    element(
      "article",
      {},
      element(
        "header",
        {},
        element("h2", { dir: "auto", textContent: chatt.name }),
        timeElement(chatt.time),
        element("span", { className: "chatt-actions" }),
      ),
      ...messageElements(message),
      media,
    ),
  );
  showDeleteButton(item);
  return item;
}

function avatarElement(name) {
  let hash = 0;
  for (const character of name) hash = (hash * 31 + character.codePointAt(0)) % 65_521;
  const avatar = element("span", { className: `avatar hue-${hash % 10}` });
  avatar.textContent = [...name.trim()].slice(0, 1).join("").toUpperCase();
  avatar.ariaHidden = "true";
  return avatar;
}

/** The message; a long one is shown in part until somebody wants all of it. */
function messageElements(text) {
  if (!text) return [];
  const message = element("p", { className: "message", dir: "auto", textContent: text });
  if (text.length < 1500 && text.split("\n").length < 15) return [message];
  message.classList.add("long");
  const more = element("button", { type: "button", className: "small", textContent: "Show all" });
  more.ariaExpanded = "false";
  more.addEventListener("click", () => {
    const isLong = message.classList.toggle("long");
    more.textContent = isLong ? "Show all" : "Show less";
    more.ariaExpanded = String(!isLong);
  });
  return [message, more];
}

const HOUR = { hour: "2-digit", minute: "2-digit" };
const DAY = { ...HOUR, day: "numeric", month: "short" };
// In the reader's zone and language. To make one takes longer than to use it for a whole page.
const [ofToday, ofThisYear, ofFormerYears, inFull] = [
  HOUR,
  DAY,
  { ...DAY, year: "numeric" },
  { dateStyle: "full", timeStyle: "long" },
].map((format) => new Intl.DateTimeFormat(undefined, format));

function timeElement(time) {
  const made = element("time", { dateTime: time, title: inFull.format(new Date(time)) });
  showTime(made);
  return made;
}

/** Only the hour for today, with the day for others. */
function showTime(made) {
  const [time, now] = [new Date(made.dateTime), new Date()];
  let format = ofFormerYears;
  if (time.toDateString() === now.toDateString()) format = ofToday;
  else if (time.getFullYear() === now.getFullYear()) format = ofThisYear;
  made.textContent = format.format(time);
}

function pictureElement(image, about) {
  const thumbnail = element("img", { alt: `Picture ${about}`, loading: "lazy" });
  // The room is taken before the picture is there: nothing moves when it comes.
  if (image.width && image.height) {
    const scale = Math.min(1, PICTURE_BOX[0] / image.width, PICTURE_BOX[1] / image.height);
    thumbnail.width = Math.max(1, Math.round(image.width * scale));
    thumbnail.height = Math.max(1, Math.round(image.height * scale));
  } else {
    thumbnail.className = "unmeasured";
    thumbnail.width = PICTURE_BOX[0] / 2;
  }
  thumbnail.addEventListener("error", () => {
    // There is no thumbnail of some adopted pictures.
    if (thumbnail.src !== image.url) thumbnail.src = image.url;
  });
  thumbnail.src = `${image.url}?thumb`;
  const button = element("button", { type: "button", className: "picture" }, thumbnail);
  button.addEventListener("click", () => viewPicture(image.url, thumbnail));
  return button;
}

function viewPicture(url, thumbnail) {
  const picture = byId("viewer-picture");
  byId("viewer-caption").textContent = thumbnail.alt;
  byId("viewer-original").href = url;
  byId("viewer-note").hidden = true;
  picture.alt = thumbnail.alt;
  picture.onerror = () => {
    // Such as a HEIC: only some browsers show it.
    picture.onerror = null;
    picture.src = thumbnail.src;
    byId("viewer-note").hidden = false;
  };
  picture.src = url;
  byId("viewer").showModal();
}

/** Asks for the beginnings of videos only when they come into sight. */
const videosInSight = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    target.preload = "metadata";
    videosInSight.unobserve(target);
  }
});

function videoElement(video, about) {
  const made = element("video", { controls: true, preload: "none", playsInline: true });
  made.ariaLabel = `Video ${about}`;
  made.src = video.url;
  made.addEventListener("error", () => {
    const link = element("a", { href: video.url, target: "_blank", rel: "noopener" });
    link.textContent = "The video cannot be played here. Open the file";
    made.replaceWith(link);
  });
  videosInSight.observe(made);
  return made;
}

function showDeleteButton(item) {
  const isOwn = tokens.has(item.dataset.id);
  const actions = item.querySelector(".chatt-actions");
  item.classList.toggle("own", isOwn);
  if (!isOwn) actions.replaceChildren();
  if (!isOwn || actions.firstChild) return;
  const button = element("button", { type: "button", className: "small", textContent: "Delete" });
  button.addEventListener("click", () => askAndDelete(item.dataset.id));
  actions.append(button);
}

/** Put a whole page into the feed: those who listen to it hear of what is new alone. */
function placePage(page) {
  scroller.ariaLive = "off";
  clearTimeout(listening);
  hasOlder = false; // so that all of them are placed
  page.chatts.forEach(place);
  hasOlder = page.chatts.length === PAGE_SIZE;
  listening = setTimeout(() => (scroller.ariaLive = "polite"), 500);
}

/** Put a chatt where its time belongs, or in the place of what it was before. */
function place(chatt) {
  if (deleted.has(chatt.id)) return null;
  const former = items.get(chatt.id);
  if (former?.chatt === JSON.stringify(chatt)) {
    showDeleteButton(former);
    return null;
  }
  const item = chattElement(chatt);
  items.set(chatt.id, item);
  if (former) {
    former.replaceWith(item);
    return null;
  }
  let next = null;
  let previous = feed.lastElementChild;
  while (previous && previous.dataset.time > chatt.time) {
    next = previous;
    previous = previous.previousElementSibling;
  }
  // Between it and the oldest that is shown others may be missing: it comes with its page.
  if (!previous && hasOlder && items.size > 1) {
    items.delete(chatt.id);
    return null;
  }
  feed.insertBefore(item, next);
  return item;
}

function remove(id) {
  deleted.add(id);
  if (deleted.size > DELETED_MAX) deleted.delete(deleted.values().next().value);
  items.get(id)?.remove();
  items.delete(id);
}

/** Change the feed without moving what is being read, or follow its end. */
function changeFeed(change) {
  const top = scroller.getBoundingClientRect().top;
  const isRead = (item) => item.getBoundingClientRect().bottom > top;
  const read = isAtEnd ? undefined : [...feed.children].find(isRead);
  const before = read?.getBoundingClientRect().top;
  const oldest = feed.firstElementChild;
  change();
  const most = isAtEnd ? SHOWN_AT_END : SHOWN_MAX;
  while (items.size > most) {
    items.delete(feed.firstElementChild.dataset.id);
    feed.firstElementChild.remove();
    hasOlder = true;
  }
  if (isAtEnd) scrollToEnd();
  else if (read?.isConnected) scroller.scrollTop += read.getBoundingClientRect().top - before;
  byId("empty").hidden = items.size > 0 || hasOlder;
  if (feed.firstElementChild !== oldest) watchBeginning();
}

function scrollToEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

function showUnseen(count) {
  unseenCount = count;
  byId("newest").hidden = !count;
  byId("newest").textContent = count === 1 ? "Show the new chatt" : `Show ${count} new chatts`;
}

function showNewest() {
  isAtEnd = true;
  scrollToEnd();
  showUnseen(0);
  scroller.focus({ preventScroll: true });
}

/** Show a chatt that has just come about, within `changeFeed`. */
function showNew(chatt) {
  const item = place(chatt);
  if (!item) return;
  item.classList.add("new");
  if (!isAtEnd) showUnseen(unseenCount + 1);
}

// Older chatts. -------------------------------------------------------------------------------

let isLoadingOlder = false;

async function loadOlder() {
  if (isLoadingOlder || !hasOlder || !feed.firstElementChild) return;
  if (items.size > SHOWN_MAX - PAGE_SIZE) {
    showOlder(`Only the newest ${items.size} chatts are shown here.`, false);
    return;
  }
  isLoadingOlder = true;
  showOlder("Loading older chatts…", false);
  const oldest = feed.firstElementChild.dataset.id;
  const loadedFor = connectCount;
  try {
    const page = await request(`v1/chatts?limit=${PAGE_SIZE}&before=${oldest}`);
    if (loadedFor !== connectCount) return; // the feed has been fetched anew meanwhile
    changeFeed(() => {
      placePage(page);
      showOlder("", false);
    });
  } catch (error) {
    showOlder(`Older chatts could not be loaded. ${error.message}`, true);
  } finally {
    isLoadingOlder = false;
  }
}

/** Say above the oldest chatt how it goes; what is being read below does not move. */
function showOlder(text, canTryAgain) {
  changeFeed(() => {
    byId("older").hidden = !text;
    byId("older-text").textContent = text;
    byId("older-again").hidden = !canTryAgain;
  });
}

const beginningInSight = new IntersectionObserver(
  (entries) => entries.at(-1).isIntersecting && loadOlder(),
  { root: scroller, rootMargin: "800px 0px 0px 0px" },
);

/** Load more as soon as the oldest chatt comes near, which it may be at once. */
function watchBeginning() {
  beginningInSight.disconnect();
  if (feed.firstElementChild) beginningInSight.observe(feed.firstElementChild);
}

// Live. ---------------------------------------------------------------------------------------

let cursor;
let stream;
let connectCount = 0;
let failures = 0;
const arrivals = [];
let reconnecting; // the timers
let quiet;

function showConnection(text, isLive) {
  const shown = byId("connection");
  if (shown.textContent !== text) shown.textContent = text;
  shown.classList.toggle("live", isLive);
}

/** Fetch the newest page, show it in place of what is there, and go on from its cursor. */
async function connect() {
  clearTimeout(reconnecting);
  stream?.close();
  const count = ++connectCount;
  try {
    const page = await request(`v1/chatts?limit=${PAGE_SIZE}`);
    if (count !== connectCount) return;
    cursor = page.cursor;
    isAtEnd = true;
    changeFeed(() => {
      arrivals.length = 0;
      feed.replaceChildren();
      items.clear();
      deleted.clear();
      placePage(page);
    });
    showUnseen(0);
    showOlder("", false);
    listen();
  } catch (error) {
    if (count !== connectCount) return;
    if (!(error instanceof Problem)) throw error;
    lose(error.message, connect);
  }
}

/** Hear of everything that comes about after `cursor`. */
function listen() {
  clearTimeout(reconnecting);
  stream?.close();
  stream = new EventSource(`v1/stream?since=${encodeURIComponent(cursor)}`);
  stream.onopen = () => {
    failures = 0;
    showConnection("Live", true);
    watchQuiet();
  };
  stream.onerror = () => {
    // The browser tries again by itself after a break, but not after an answer that is an error.
    if (stream.readyState === EventSource.CLOSED) lose("There are no live updates.", catchUp);
    else showConnection("Connection lost. Trying again…", false);
  };
  on("chatt", (chatt) => arrive(() => showNew(chatt)));
  on("delete", ({ id }) => arrive(() => remove(id)));
  on("reset", connect);
}

function on(name, handle) {
  stream.addEventListener(name, (event) => {
    cursor = event.lastEventId;
    watchQuiet();
    handle(JSON.parse(event.data));
  });
}

/** Change the feed soon: many events come at once after a break, and are shown at once. */
function arrive(change) {
  arrivals.push(change);
  if (arrivals.length > 1) return;
  setTimeout(() => changeFeed(() => arrivals.splice(0).forEach((arrived) => arrived())), ARRIVE_MS);
}

function watchQuiet() {
  clearTimeout(quiet);
  quiet = setTimeout(listen, QUIET_MS);
}

function lose(reason, again) {
  clearTimeout(reconnecting);
  showConnection(`${reason} Trying again…`, false);
  reconnecting = setTimeout(again, backoffMs(failures));
  failures += 1;
}

/** Without a stream: fetch what it would have told, say what is wrong, and try it again. */
async function catchUp() {
  const since = cursor;
  try {
    const changes = await request(
      `v1/chatts?limit=${PAGE_SIZE}&since=${encodeURIComponent(since)}`,
    );
    if (since !== cursor) return;
    if (changes.reset) {
      connect();
      return;
    }
    cursor = changes.cursor;
    changeFeed(() => {
      changes.chatts.forEach(showNew);
      changes.deleted.forEach(remove);
    });
    listen();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    lose(error.message, catchUp);
  }
}

/** Connect anew where the old connection may be dead, or where waiting is no longer needed. */
function connectNow() {
  if (cursor === undefined) connect();
  else listen();
}

// Writing. ------------------------------------------------------------------------------------

const composer = byId("composer");
const attached = { image: null, video: null };
const limits = { name_max_length: Infinity, message_max_length: Infinity, media_max_size: Infinity };
let sending = null; // the request under way, or the timer before the next one
let idempotencyKey = null;

/** A key for what is in the form now: sent again with the same key, it is not posted twice. */
function newKey() {
  // Not randomUUID: that is there on https and localhost only.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A form of several parts has \r\n for each end of a line (HTML, "multipart/form-data"). */
function messageToSend() {
  const message = byId("message").value;
  return hasMedia() ? message.replaceAll("\n", "\r\n") : message;
}

const hasMedia = () => Boolean(attached.image || attached.video);
const lengthOf = (text) => [...text].length; // in characters, as the server counts
const sizeInWords = (size) =>
  size < 2 ** 20 ? `${Math.ceil(size / 2 ** 10)} KB` : `${(size / 2 ** 20).toFixed(1)} MB`;

/** Say what is wrong with the form, or nothing. */
function faultOfForm() {
  const name = byId("name").value;
  if (!name.trim()) return ["name", "Please enter your name."];
  if (lengthOf(name) > limits.name_max_length)
    return ["name", `The name is too long: it may have ${limits.name_max_length} characters.`];
  if (!byId("message").value.trim() && !hasMedia()) return ["message", "Please write a message."];
  const length = lengthOf(messageToSend());
  if (length > limits.message_max_length)
    return [
      "message",
      `The message has ${length} characters; it may have ${limits.message_max_length}.`,
    ];
  return null;
}

function showProblem(text) {
  byId("composer-problem").textContent = text;
}

function showLeft() {
  const left = limits.message_max_length - lengthOf(messageToSend());
  const isNear = left < limits.message_max_length / 5;
  byId("left").textContent = isNear ? `${left} characters left` : "";
}

function attach(kind, file) {
  if (file.size > limits.media_max_size) {
    const most = sizeInWords(limits.media_max_size);
    showProblem(`This file is too large: it has ${sizeInWords(file.size)}, and ${most} is the most.`);
    return;
  }
  showProblem("");
  attached[kind] = file;
  formChanged();
}

function attachFiles(files) {
  for (const file of files) {
    const kind = file.type.split("/")[0];
    if (Object.hasOwn(attached, kind)) attach(kind, file);
    else showProblem("Only pictures and videos can be attached.");
  }
}

/** Keep the browser from leaving the page for a file that is dropped. */
function acceptFiles(event) {
  const hasFiles = event.dataTransfer.types.includes("Files");
  if (hasFiles) event.preventDefault();
  return hasFiles;
}

function showAttachments() {
  byId("attachments").replaceChildren(
    ...Object.entries(attached).flatMap(([kind, file]) => (file ? [attachment(kind, file)] : [])),
  );
}

function attachment(kind, file) {
  const button = element("button", { type: "button", className: "small", textContent: "Remove" });
  button.ariaLabel = `Remove the ${kind === "image" ? "picture" : "video"}`;
  button.addEventListener("click", () => {
    attached[kind] = null;
    formChanged();
    byId(kind).focus();
  });
  const text = element("span", { textContent: `${shortened(file.name, 60)}, ${sizeInWords(file.size)}` });
  const item = element("li", {}, text, button);
  if (kind === "image") drawPreview(file, item);
  return item;
}

/** On a canvas: an address of the picture (blob:) would need a hole in the page's policy. */
async function drawPreview(file, item) {
  try {
    const bitmap = await createImageBitmap(file, { resizeHeight: 112, resizeQuality: "high" });
    const canvas = element("canvas", { width: bitmap.width, height: bitmap.height });
    canvas.ariaHidden = "true";
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    item.prepend(canvas);
  } catch {
    // Its name is shown anyway.
  }
}

function formChanged() {
  idempotencyKey = null; // another content is another chatt
  showAttachments();
  showLeft();
}

function submit(event) {
  event.preventDefault();
  if (sending) return;
  const fault = faultOfForm();
  showProblem(fault ? fault[1] : "");
  if (fault) {
    byId(fault[0]).focus();
    return;
  }
  keep("chatterd.name", byId("name").value);
  idempotencyKey ??= newKey();
  setSending(true);
  send(0);
}

/** Send what is in the form, which nobody can change meanwhile. */
function send(attempt) {
  const [name, message] = [byId("name").value, byId("message").value];
  let body = JSON.stringify({ name, message });
  if (hasMedia()) {
    body = new FormData();
    body.append("name", name);
    body.append("message", message);
    // Not under its own name, which is nobody's business.
    for (const [kind, file] of Object.entries(attached)) if (file) body.append(kind, file, kind);
  }
  const post = new XMLHttpRequest(); // fetch() tells nothing of an upload's progress
  post.open("POST", "v1/chatts");
  post.setRequestHeader("Idempotency-Key", idempotencyKey);
  if (typeof body === "string") post.setRequestHeader("Content-Type", "application/json");
  else showProgress(post.upload);
  post.timeout = hasMedia() ? (limits.upload_timeout ?? 300) * 1000 + POST_MS : POST_MS;
  post.onload = () => {
    if (post.status === 201) sent(JSON.parse(post.responseText));
    else fail(Problem.of(post.status, post.responseText, post.getResponseHeader("retry-after")), attempt);
  };
  post.onerror = post.ontimeout = () => fail(Problem.unreachable(), attempt);
  post.send(body);
  sending = { stop: () => post.abort() };
}

function showProgress(upload) {
  byId("progress").hidden = false;
  upload.onprogress = ({ loaded, total }) => {
    const percent = total ? Math.floor((loaded / total) * 100) : 0;
    byId("uploaded").value = percent;
    byId("progress-text").textContent = percent < 100 ? `${percent} %` : "Nearly done…";
  };
}

/** After a failure that may pass, try again with the same key; else say what is wrong. */
function fail(problem, attempt) {
  const mayPass = [0, 408, 409, 429, 502, 503, 504].includes(problem.status);
  if (!mayPass || attempt + 1 >= ATTEMPTS_MAX) {
    setSending(false);
    showProblem(problem.message);
    focusUnlessElsewhere("send");
    return;
  }
  showProblem(`${problem.message} Trying again…`);
  const waitMs = Math.min(RETRY_MAX_MS, Math.max(problem.retryAfterMs, backoffMs(attempt)));
  const timer = setTimeout(() => send(attempt + 1), waitMs);
  sending = { stop: () => clearTimeout(timer) };
  byId("progress").hidden = false;
}

function sent({ delete_token: token, ...chatt }) {
  changeTokens(() => tokens.set(chatt.id, token));
  byId("message").value = "";
  attached.image = attached.video = null;
  formChanged();
  setSending(false);
  showProblem("");
  isAtEnd = true;
  // With its button: the stream may have shown it before the token was there.
  changeFeed(() => showNew(chatt));
  focusUnlessElsewhere("message");
}

/** Give back the focus that a control lost when it was disabled. */
function focusUnlessElsewhere(id) {
  if (document.activeElement === document.body) byId(id).focus();
}

function setSending(isSending) {
  if (!isSending) sending = null;
  for (const control of composer.elements) control.disabled = isSending && control.id !== "stop";
  byId("send").textContent = isSending ? "Sending…" : "Send";
  byId("uploaded").value = 0;
  byId("progress-text").textContent = "";
  if (!isSending) byId("progress").hidden = true;
}

function stopSending() {
  sending?.stop();
  setSending(false);
  showProblem("Stopped. What is in the form can be sent again.");
  byId("send").focus();
}

// Deleting. -----------------------------------------------------------------------------------

function askAndDelete(id) {
  const asking = byId("asking");
  asking.returnValue = "keep"; // what Escape means
  asking.onclose = () => asking.returnValue === "delete" && deleteOwn(id);
  asking.showModal();
}

async function deleteOwn(id) {
  try {
    const headers = { "Chatterd-Delete-Token": tokens.get(id) };
    await request(`v1/chatts/${id}`, { method: "DELETE", headers });
  } catch (error) {
    if (error.status !== 404) {
      showProblem(`The chatt was not deleted. ${error.message}`);
      return;
    }
  }
  changeTokens(() => tokens.delete(id));
  changeFeed(() => remove(id));
  scroller.focus({ preventScroll: true });
}

// The beginning. ------------------------------------------------------------------------------

composer.addEventListener("submit", submit);
composer.addEventListener("input", formChanged);
byId("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
});
byId("stop").addEventListener("click", stopSending);
for (const kind of Object.keys(attached)) {
  byId(kind).addEventListener("change", ({ target }) => {
    const [file] = target.files;
    target.value = ""; // so that the same file can be chosen again
    if (file) attach(kind, file);
  });
}
composer.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  attachFiles(event.clipboardData.files);
});
addEventListener("dragover", acceptFiles);
addEventListener("drop", (event) => {
  if (acceptFiles(event) && !sending) attachFiles(event.dataTransfer.files);
});

scroller.addEventListener("scroll", () => {
  const below = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  isAtEnd = below < NEAR_END_PX;
  if (isAtEnd && unseenCount) showUnseen(0);
});
new ResizeObserver(() => isAtEnd && scrollToEnd()).observe(scroller);
byId("newest").addEventListener("click", showNewest);
byId("older-again").addEventListener("click", loadOlder);
byId("viewer").addEventListener("close", () => byId("viewer-picture").removeAttribute("src"));

addEventListener("online", connectNow);
addEventListener("offline", connectNow); // a server on the same machine is there all the same
addEventListener("pageshow", ({ persisted }) => persisted && connectNow());
document.addEventListener("visibilitychange", () => document.hidden || connectNow());
addEventListener("storage", ({ key }) => {
  if (key !== "chatterd.tokens") return;
  recallTokens();
  changeFeed(() => items.forEach(showDeleteButton));
});

// Yesterday begins at midnight.
let today = new Date().toDateString();
setInterval(() => {
  if (today === new Date().toDateString()) return;
  today = new Date().toDateString();
  for (const time of feed.querySelectorAll("time")) showTime(time);
}, 60_000);

byId("name").value = recall("chatterd.name") ?? "";
recallTokens();
connect();
request("v1/limits").then(
  (known) => {
    Object.assign(limits, known);
    showLeft();
  },
  () => {}, // The server holds to its limits anyway.
);
