// The images stay in the browser; the one that is chosen goes along with each call (see page.py). A video is sent to /video.
const state = (window.sievit = { image: "", file: null, given });
const find = (name) => element.querySelector(name);
const drop = find(".drop"), input = find("input"), thumbs = find(".thumbs"), video = find("video");
const isVideo = (file) => file.type.startsWith("video/") || /\.(mp4|mov|m4v|mkv|webm|avi|mpe?g|m?ts|wmv|flv|ogv|3gp)$/i.test(file.name);
let sent = null;

function choose(file, button) {
  thumbs.querySelectorAll("button").forEach((each) => each.setAttribute("aria-pressed", each === button));
  state.file = file;
  if (isVideo(file)) return trigger("picked");
  const reader = new FileReader();
  reader.onload = () => {
    state.image = reader.result;
    trigger("picked");
  };
  reader.readAsDataURL(file);
}

function given(policy, budget) {
  sent?.abort();
  document.querySelector("#clip .film").replaceChildren();
  if (!state.file || !isVideo(state.file)) return state.image;
  const query = new URLSearchParams();
  if (policy !== null) query.set("policy", policy);
  if (budget !== null) query.set("budget", budget / 100);
  film(query, (sent = new AbortController()));
  return "@VIDEO@";
}

function made(name, attributes) {
  return Object.assign(document.createElement(name), attributes);
}

async function film(query, own) {
  const place = document.querySelector("#clip .film"), says = made("p", { role: "status" });
  place.append(says);
  says.textContent = "The video is computed, one frame after the other. It will be here.";
  try {
    if (state.file.size > @MOST@) throw new Error("@TOO_LARGE@");
    const answer = await fetch("/video?" + query, { method: "POST", body: state.file, signal: own.signal });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const source = URL.createObjectURL(await answer.blob());
    says.textContent = answer.headers.get("Sievit-Video");
    place.prepend(made("video", { src: source, controls: true, muted: true }));
    place.append(made("a", { className: "button", href: source, download: "found.mp4", textContent: "Video, MP4" }));
  } catch (error) {
    if (!own.signal.aborted) says.textContent = error.message;
  }
}

function add(files) {
  files = [...files].filter((file) => !file.name.startsWith("."));
  const buttons = files.slice(0, 200).map((file) => {
    const button = document.createElement("button"), picture = document.createElement(isVideo(file) ? "video" : "img");
    picture.src = URL.createObjectURL(file);
    picture.alt = picture.ariaLabel = button.title = file.name;
    picture.loading = "lazy";
    button.append(picture);
    button.onclick = () => choose(file, button);
    thumbs.append(button);
    return button;
  });
  if (buttons.length) choose(files[0], buttons[0]);
}

async function entries(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), found = [];
  for (;;) {
    const part = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!part.length) return found;
    for (const each of part) found.push(...(await entries(each)));
  }
}

drop.onclick = () => { input.webkitdirectory = false; input.click(); };
drop.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); drop.onclick(); } };
input.onclick = (event) => event.stopPropagation();
input.onchange = () => { add(input.files); input.value = ""; };
find("[data-folder]").onclick = () => { input.webkitdirectory = true; input.click(); };

const over = (event, is) => { event.preventDefault(); drop.classList.toggle("over", is); };
document.addEventListener("dragover", (event) => over(event, true));
document.addEventListener("dragleave", (event) => over(event, false));
document.addEventListener("drop", async (event) => {
  over(event, false);
  const dropped = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  add(dropped.length ? (await Promise.all(dropped.map(entries))).flat() : event.dataTransfer.files);
});
document.addEventListener("paste", (event) => add(event.clipboardData.files));

const camera = find("[data-camera]");
camera.hidden = !navigator.mediaDevices;
camera.onclick = async () => {
  if (video.hidden) {
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      camera.textContent = "no camera";
      return;
    }
    video.hidden = false;
    camera.textContent = "take it";
    await video.play();
    return;
  }
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  video.srcObject.getTracks().forEach((track) => track.stop());
  video.hidden = true;
  camera.textContent = "the camera";
  canvas.toBlob((blob) => add([new File([blob], "camera.jpg", { type: "image/jpeg" })]), "image/jpeg", 0.95);
};

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-picture]");
  if (!button || !state.file) return;
  button.disabled = true;
  try {
    const answer = await fetch(button.dataset.picture, { method: "POST", body: state.file });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = "result.png";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  } catch (error) {
    button.textContent = error.message;
  }
  button.disabled = false;
});
