// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * Stands in for the driver sev-guest below Linux's configfs-tsm, in test images
 * only: registers a provider of reports, and lets a daemon in user space make
 * them. So configfs itself, with its attributes, generations and errors, is the
 * kernel's own, and what signs is kagimori_simulator.
 *
 * For Linux 6.11 to 6.16, whose interface is tsm_register().
 *
 * configfs-tsm holds its lock for writing while a report is made, so there is
 * one request at a time. It is waited for with a limit: a daemon that is absent,
 * dies or hangs is an error to who asks, and never a hung task.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/err.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/string.h>
#include <linux/tsm.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "kagimori_tsm.h"

/* More than configfs-tsm hands on, so that it is the one to refuse. */
#define BLOB_MAX	(2 * TSM_OUTBLOB_MAX)

static unsigned int vmpl;
module_param(vmpl, uint, 0444);
MODULE_PARM_DESC(vmpl, "VMPL of this guest's kernel: 0, or more below an SVSM, whose attributes are shown then");

#define TIMEOUT_MAX_S	3600

/* More than the minute of a throttled driver, less than khungtaskd's two. */
static unsigned int timeout_s = 75;
module_param(timeout_s, uint, 0444);
MODULE_PARM_DESC(timeout_s, "Seconds that the daemon may take for a report");

enum stage {
	IDLE,		/* nobody asks */
	ASKED,		/* a request is there to be read */
	TAKEN,		/* the daemon has it */
	ANSWERED,	/* and is done */
};

struct blob {
	void *data;
	size_t size;
};

/* Protects all that follows; who waits looks without it, and again with it. */
static DEFINE_MUTEX(lock);
static DECLARE_WAIT_QUEUE_HEAD(asked);
static DECLARE_WAIT_QUEUE_HEAD(answered);
static bool daemon_there;
static enum stage stage;
static struct kagimori_tsm_request request;
static unsigned int answer_error;
static struct blob outblob, auxblob, manifestblob;

static_assert(KAGIMORI_TSM_INBLOB_MAX == TSM_INBLOB_MAX);
static_assert(sizeof(guid_t) == sizeof(request.service_guid));

static void drop(struct blob *blob)
{
	kvfree(blob->data);
	*blob = (struct blob){};
}

static void drop_answer(void)
{
	drop(&outblob);
	drop(&auxblob);
	drop(&manifestblob);
}

static int ask(const struct tsm_desc *desc)
{
	lockdep_assert_held(&lock);

	if (!daemon_there)
		return -ENXIO;

	request = (struct kagimori_tsm_request){
		.number = request.number + 1,
		.privlevel = desc->privlevel,
		.manifest_version = desc->service_manifest_version,
		.inblob_size = desc->inblob_len,
	};
	memcpy(request.inblob, desc->inblob, desc->inblob_len);
	export_guid(request.service_guid, &desc->service_guid);
	if (desc->service_provider) {
		request.flags = KAGIMORI_TSM_SERVICE;
		/* There is no provider with such a name. */
		if (strscpy(request.service_provider, desc->service_provider) < 0)
			return -EINVAL;
	}
	WRITE_ONCE(stage, ASKED);
	return 0;
}

static int report_new(struct tsm_report *report, void *data)
{
	long left;
	int rc;

	mutex_lock(&lock);
	rc = ask(&report->desc);
	mutex_unlock(&lock);
	if (rc)
		return rc;

	wake_up(&asked);
	left = wait_event_killable_timeout(answered, READ_ONCE(stage) == ANSWERED,
					   (unsigned long)timeout_s * HZ);

	mutex_lock(&lock);
	if (stage == ANSWERED) {
		rc = -(int)answer_error;
		if (!rc) {
			report->outblob = outblob.data;
			report->outblob_len = outblob.size;
			report->auxblob = auxblob.data;
			report->auxblob_len = auxblob.size;
			report->manifestblob = manifestblob.data;
			report->manifestblob_len = manifestblob.size;
			/* configfs-tsm frees them. */
			outblob = auxblob = manifestblob = (struct blob){};
		}
	} else {
		rc = left < 0 ? -EINTR : -ETIMEDOUT;
	}
	WRITE_ONCE(stage, IDLE);
	mutex_unlock(&lock);
	return rc;
}

static bool attr_visible(int n)
{
	return vmpl || n <= TSM_REPORT_PRIVLEVEL_FLOOR;
}

static bool bin_attr_visible(int n)
{
	return vmpl || n != TSM_REPORT_MANIFESTBLOB;
}

static struct tsm_ops ops = {
	.name = "sev_guest",
	.report_new = report_new,
	.report_attr_visible = attr_visible,
	.report_bin_attr_visible = bin_attr_visible,
};

static int device_open(struct inode *inode, struct file *file)
{
	int rc = 0;

	mutex_lock(&lock);
	if (daemon_there)
		rc = -EBUSY;
	daemon_there = true;
	mutex_unlock(&lock);
	return rc ?: stream_open(inode, file);
}

static int device_release(struct inode *inode, struct file *file)
{
	mutex_lock(&lock);
	daemon_there = false;
	if (stage == ASKED || stage == TAKEN) {
		answer_error = ENXIO;
		WRITE_ONCE(stage, ANSWERED);
	}
	mutex_unlock(&lock);
	wake_up(&answered);
	return 0;
}

static ssize_t device_read(struct file *file, char __user *buf, size_t count, loff_t *pos)
{
	ssize_t rc;

	if (count < sizeof(request))
		return -EINVAL;

	for (;;) {
		rc = wait_event_interruptible(asked, READ_ONCE(stage) == ASKED);
		if (rc)
			return rc;

		mutex_lock(&lock);
		if (stage == ASKED)
			break;
		mutex_unlock(&lock);
	}

	rc = -EFAULT;
	if (!copy_to_user(buf, &request, sizeof(request))) {
		rc = sizeof(request);
		WRITE_ONCE(stage, TAKEN);
	}
	mutex_unlock(&lock);
	return rc;
}

static int take(struct blob *blob, const char __user **from, size_t size)
{
	void *data;

	if (!size)
		return 0;
	data = vmemdup_user(*from, size);
	if (IS_ERR(data))
		return PTR_ERR(data);
	*blob = (struct blob){ .data = data, .size = size };
	*from += size;
	return 0;
}

static bool well_formed(const struct kagimori_tsm_answer *head, size_t count)
{
	if (head->error >= MAX_ERRNO || head->outblob_size > BLOB_MAX ||
	    head->auxblob_size > BLOB_MAX || head->manifestblob_size > BLOB_MAX)
		return false;
	/* An error comes without blobs, a success with an outblob at least. */
	if (!head->error != !!head->outblob_size)
		return false;
	return count == sizeof(*head) + head->outblob_size + head->auxblob_size +
			head->manifestblob_size;
}

static ssize_t device_write(struct file *file, const char __user *buf, size_t count, loff_t *pos)
{
	const char __user *from = buf + sizeof(struct kagimori_tsm_answer);
	struct kagimori_tsm_answer head;
	int rc;

	if (count < sizeof(head))
		return -EINVAL;
	if (copy_from_user(&head, buf, sizeof(head)))
		return -EFAULT;
	if (!well_formed(&head, count))
		return -EINVAL;

	mutex_lock(&lock);
	/* Who asked may have given up meanwhile. */
	rc = stage == TAKEN && head.number == request.number ? 0 : -ESTALE;
	if (!rc) {
		drop_answer();
		rc = take(&outblob, &from, head.outblob_size) ?:
		     take(&auxblob, &from, head.auxblob_size) ?:
		     take(&manifestblob, &from, head.manifestblob_size);
	}
	if (!rc) {
		answer_error = head.error;
		WRITE_ONCE(stage, ANSWERED);
	}
	mutex_unlock(&lock);
	if (rc)
		return rc;
	wake_up(&answered);
	return count;
}

static const struct file_operations device_fops = {
	.owner = THIS_MODULE,
	.open = device_open,
	.release = device_release,
	.read = device_read,
	.write = device_write,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "kagimori-tsm",
	.mode = 0600,
	.fops = &device_fops,
};

static int __init kagimori_tsm_init(void)
{
	int rc;

	if (vmpl > TSM_PRIVLEVEL_MAX || !timeout_s || timeout_s > TIMEOUT_MAX_S)
		return -EINVAL;
	ops.privlevel_floor = vmpl;

	rc = misc_register(&device);
	if (rc)
		return rc;
	rc = tsm_register(&ops, NULL);
	if (rc)
		misc_deregister(&device);
	return rc;
}
module_init(kagimori_tsm_init);

static void __exit kagimori_tsm_exit(void)
{
	/* Waits for a report that is being made, as configfs-tsm holds its lock. */
	tsm_unregister(&ops);
	misc_deregister(&device);
	drop_answer();
}
module_exit(kagimori_tsm_exit);

MODULE_DESCRIPTION("Simulated provider of attestation reports, for tests");
MODULE_LICENSE("GPL");
